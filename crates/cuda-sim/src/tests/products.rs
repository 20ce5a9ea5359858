//! Products of matrices.

use half::{bf16, f16};

use super::harness::*;
use crate::blas::{INVALID_VALUE, NOT_SUPPORTED};

/// A product of columns: `d[m, n] = op(a) op(b) + bias`, on descriptors of its own.
struct Product {
    handle: u64,
    desc: u64,
    layouts: [u64; 4],
    preference: u64,
}

impl Product {
    /// Types by their numbers; `batch` products at a distance of a whole matrix.
    fn new(input: i32, output: i32, [m, n, k]: [u64; 3], turned: [bool; 2], batch: i32) -> Self {
        let set = |desc: u64, attribute: i32, value: i32| {
            well(cublasLtMatmulDescSetAttribute(desc, attribute, (&raw const value).cast(), 4));
        };
        let layout = |kind: i32, rows: u64, cols: u64| {
            let layout = made(|out| cublasLtMatrixLayoutCreate(out, kind, rows, cols, rows as i64));
            let stride = (rows * cols) as i64;
            well(cublasLtMatrixLayoutSetAttribute(layout, layout::BATCH_COUNT, (&raw const batch).cast(), 4));
            well(cublasLtMatrixLayoutSetAttribute(layout, layout::STRIDED_BATCH_OFFSET, (&raw const stride).cast(), 8));
            layout
        };
        let desc = made(|out| cublasLtMatmulDescCreate(out, 68, 0));
        set(desc, desc::TRANSA, turned[0].into());
        set(desc, desc::TRANSB, turned[1].into());
        let a = if turned[0] { layout(input, k, m) } else { layout(input, m, k) };
        let b = if turned[1] { layout(input, n, k) } else { layout(input, k, n) };
        Self {
            handle: made(|out| cublasLtCreate(out)),
            desc,
            layouts: [a, b, layout(output, m, n), layout(output, m, n)],
            preference: made(|out| cublasLtMatmulPreferenceCreate(out)),
        }
    }

    fn heuristic(&self) -> (i32, Heuristic) {
        let [a, b, c, d] = self.layouts;
        // SAFETY: all zeros are a heuristic's answer that says nothing.
        let mut found = unsafe { std::mem::zeroed::<Heuristic>() };
        let mut count = 0;
        let (handle, desc) = (self.handle, self.desc);
        let code = cublasLtMatmulAlgoGetHeuristic(handle, desc, a, b, c, d, self.preference, 1, &mut found, &mut count);
        assert_eq!(count, i32::from(code == 0));
        (code, found)
    }

    fn run(
        &self,
        session: &Session,
        beta: f32,
        [a, b, d]: [u64; 3],
        found: &Heuristic,
        workspace: (u64, usize),
    ) -> i32 {
        let [al, bl, cl, dl] = self.layouts;
        let (handle, desc, stream, algorithm) = (self.handle, self.desc, session.stream, &found.algorithm);
        let (at, bytes) = workspace;
        // SAFETY: the factors are f32, the algorithm is a heuristic's.
        unsafe { cublasLtMatmul(handle, desc, &1.0, a, al, b, bl, &beta, d, cl, d, dl, algorithm, at, bytes, stream) }
    }
}

impl Drop for Product {
    fn drop(&mut self) {
        well(cublasLtDestroy(self.handle));
        well(cublasLtMatmulDescDestroy(self.desc));
        self.layouts.iter().for_each(|&layout| well(cublasLtMatrixLayoutDestroy(layout)));
        well(cublasLtMatmulPreferenceDestroy(self.preference));
    }
}

const SIZES: [usize; 3] = [5, 3, 20];

/// Small integers, so that every sum is exact in every type.
fn operands(batch: usize) -> (Vec<f32>, Vec<f32>) {
    let [m, n, k] = SIZES;
    let a = (0..batch * m * k).map(|i| (i * 7 % 5) as f32 - 2.0).collect();
    let b = (0..batch * n * k).map(|i| (i * 3 % 7) as f32 - 3.0).collect();
    (a, b)
}

/// What the operands give, column by column.
fn expected(a: &[f32], b: &[f32], turned: [bool; 2], batch: usize) -> Vec<f32> {
    let [m, n, k] = SIZES;
    let at = |x: &[f32], at: usize, i: usize, l: usize, rows: usize, turned: bool| {
        x[at + if turned { i * k + l } else { l * rows + i }]
    };
    let one = |t: usize, i: usize, j: usize| {
        let term = |l| at(a, t * m * k, i, l, m, turned[0]) * at(b, t * n * k, j, l, n, !turned[1]);
        (0..k).map(term).sum()
    };
    (0..batch * m * n).map(|x| one(x / (m * n), x % m, x / m % n)).collect()
}

#[test]
fn products_of_every_orientation_and_of_batches_are_those_of_plain_loops() {
    let session = Session::new();
    for turned in [[false, false], [true, false], [false, true], [true, true]] {
        for batch in [1, 3] {
            let (a, b) = operands(batch);
            let expected = expected(&a, &b, turned, batch);
            let product = Product::new(0, 0, SIZES.map(|n| n as u64), turned, batch as i32);
            let (d, found) = (session.alloc(expected.len() * 4), product.heuristic().1);
            well(product.run(&session, 0.0, [session.upload(&a), session.upload(&b), d], &found, (0, 0)));
            assert_eq!(session.download::<f32>(d, expected.len()), expected, "{turned:?} {batch}");
        }
    }
    assert_eq!(count("live.blas_layouts") + count("live.blas_descs") + count("live.blas_handles"), 0);
}

#[test]
fn operands_of_16_bits_give_their_own_type_or_f32() {
    let session = Session::new();
    let (a, b) = operands(1);
    let turned = [true, false];
    let expected = expected(&a, &b, turned, 1);
    let sizes = SIZES.map(|n| n as u64);
    let half = |x: &[f32]| x.iter().map(|&v| f16::from_f32(v).to_bits()).collect::<Vec<u16>>();
    let brain = |x: &[f32]| x.iter().map(|&v| bf16::from_f32(v).to_bits()).collect::<Vec<u16>>();
    let (d, wide) = (session.alloc(2 * expected.len()), session.alloc(4 * expected.len()));
    type Round<'a> = &'a dyn Fn(&[f32]) -> Vec<u16>;
    let cases: [(i32, Round); 2] = [(2, &half), (14, &brain)];
    for (kind, round) in cases {
        let (a, b) = (session.upload(&round(&a)), session.upload(&round(&b)));
        let product = Product::new(kind, kind, sizes, turned, 1);
        well(product.run(&session, 0.0, [a, b, d], &product.heuristic().1, (0, 0)));
        assert_eq!(session.download::<u16>(d, expected.len()), round(&expected));
        let product = Product::new(kind, 0, sizes, turned, 1);
        well(product.run(&session, 0.0, [a, b, wide], &product.heuristic().1, (0, 0)));
        well(product.run(&session, 1.0, [a, b, wide], &product.heuristic().1, (0, 0)));
        let twice: Vec<f32> = expected.iter().map(|v| 2.0 * v).collect();
        assert_eq!(session.download::<f32>(wide, expected.len()), twice, "added to what was there");
    }
    assert_eq!(Product::new(14, 2, sizes, turned, 1).heuristic().0, NOT_SUPPORTED);
}

#[test]
fn a_bias_is_added_to_each_column() {
    let session = Session::new();
    let (a, b) = operands(1);
    let bias = [1f32, 2.0, 3.0, 4.0, 5.0];
    let product = Product::new(0, 0, SIZES.map(|n| n as u64), [true, false], 1);
    let at = session.upload(&bias);
    let epilogue = EPILOGUE_BIAS;
    well(cublasLtMatmulDescSetAttribute(product.desc, desc::EPILOGUE, (&raw const epilogue).cast(), 4));
    well(cublasLtMatmulDescSetAttribute(product.desc, desc::BIAS_POINTER, (&raw const at).cast(), 8));
    let d = session.alloc(60);
    let operands = [session.upload(&a), session.upload(&b), d];
    well(product.run(&session, 0.0, operands, &product.heuristic().1, (0, 0)));
    let plain = expected(&a, &b, [true, false], 1);
    let expected: Vec<f32> = plain.iter().enumerate().map(|(i, v)| v + bias[i % 5]).collect();
    assert_eq!(session.download::<f32>(d, 15), expected);
}

#[test]
fn an_algorithm_is_refused_where_its_promises_are_not_kept() {
    let session = Session::new();
    let (a, b) = operands(1);
    let sizes = SIZES.map(|n| n as u64);
    let product = Product::new(0, 0, sizes, [true, false], 1);
    let bytes = 1u64 << 20;
    let attribute = preference::MAX_WORKSPACE_BYTES;
    well(cublasLtMatmulPreferenceSetAttribute(product.preference, attribute, (&raw const bytes).cast(), 8));
    let (_, found) = product.heuristic();
    let operands = [session.upload(&a), session.upload(&b), session.alloc(1024)];
    let [left, right, d] = operands;
    let workspace = (session.alloc(found.workspace), found.workspace);
    assert_eq!(product.run(&session, 0.0, operands, &found, (0, 0)), INVALID_VALUE, "no workspace");
    assert_eq!(product.run(&session, 0.0, [left, right, d + 16], &found, workspace), NOT_SUPPORTED, "alignment");
    assert_eq!(product.run(&session, 0.0, [left, right, d + 1024], &found, workspace), INVALID_VALUE, "out of range");
    let other = Product::new(0, 0, sizes, [true, false], 1);
    well(other.run(&session, 0.0, operands, &found, workspace));
    let other = Product::new(0, 0, [5, 2, 20], [true, false], 1);
    assert_eq!(other.run(&session, 0.0, operands, &found, workspace), NOT_SUPPORTED, "another product");
    well(product.run(&session, 0.0, operands, &found, workspace));
    well(session.synchronize());
}
