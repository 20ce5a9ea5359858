//! Products of matrices as cuBLASLt describes them, computed with plain loops in f32.
//!
//! Invariant: an algorithm is only for the problem it was asked for, with the workspace and the alignment that were promised then; a product
//! that is given another is refused.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    thread,
};

use half::{bf16, f16};

use crate::{
    dtype::DType,
    machine::{Fail, fail},
    table::{Kind, Table},
};

pub const INVALID_VALUE: i32 = 7;
pub const EXECUTION_FAILED: i32 = 13;
pub const NOT_SUPPORTED: i32 = 15;

/// Host objects of the library.
pub struct Blas {
    pub handles: Table<()>,
    pub descs: Table<Desc>,
    pub layouts: Table<Layout>,
    pub preferences: Table<Preference>,
}

impl Blas {
    pub fn new() -> Self {
        Self {
            handles: Table::new(Kind::LtHandle),
            descs: Table::new(Kind::MatmulDesc),
            layouts: Table::new(Kind::MatrixLayout),
            preferences: Table::new(Kind::MatmulPreference),
        }
    }
}

/// What a product does beside multiplying.
#[derive(Clone, Copy, Hash)]
pub struct Desc {
    pub trans_a: bool,
    pub trans_b: bool,
    pub bias: bool,
    /// Of the bias, a vector of as many elements as the result has rows.
    pub bias_at: u64,
    /// As of the result, if it is not said.
    pub bias_dtype: Option<DType>,
}

/// A column-major matrix, or several at a distance of `stride` elements.
#[derive(Clone, Copy, Hash, Debug)]
pub struct Layout {
    pub dtype: DType,
    pub rows: u64,
    pub cols: u64,
    pub ld: i64,
    pub batch: i32,
    pub stride: i64,
}

impl Layout {
    /// Bytes from the first element to behind the last.
    fn bytes(&self) -> u64 {
        let last = (self.batch as i64 - 1) * self.stride + (self.cols as i64 - 1) * self.ld + self.rows as i64;
        last as u64 * self.dtype.bytes()
    }
}

#[derive(Clone, Copy)]
pub struct Preference {
    pub workspace: u64,
    /// Of the four matrices.
    pub alignment: [u32; 4],
}

/// What a caller keeps of a heuristic's answer.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Algorithm {
    problem: u64,
    pub workspace: u64,
    alignment: [u32; 4],
    unused: [u64; 4],
}

/// Descriptor and layouts of one product.
#[derive(Clone, Copy)]
pub struct Problem {
    pub desc: Desc,
    pub a: Layout,
    pub b: Layout,
    pub c: Layout,
    pub d: Layout,
}

impl Problem {
    /// Rows, columns and depth of the product, if it is one and of supported types.
    fn sizes(&self) -> Result<[usize; 3], Fail> {
        let turned = |layout: &Layout, turned: bool| {
            if turned { (layout.cols, layout.rows) } else { (layout.rows, layout.cols) }
        };
        let ((m, k), (depth, n)) = (turned(&self.a, self.desc.trans_a), turned(&self.b, self.desc.trans_b));
        let fits = k == depth && [self.c, self.d].iter().all(|l| (l.rows, l.cols) == (m, n));
        let layouts = [self.a, self.b, self.c, self.d];
        if !fits
            || layouts.iter().any(|l| l.ld < l.rows as i64 || l.batch != self.d.batch || l.rows == 0 || l.cols == 0)
        {
            return Err(fail!(INVALID_VALUE, "layouts that are no product: {layouts:?}"));
        }
        let (input, output) = (self.a.dtype, self.d.dtype);
        if self.b.dtype != input || self.c.dtype != output || (output != input && output != DType::F32) {
            return Err(fail!(NOT_SUPPORTED, "a product of {input:?} and {:?} as {output:?}", self.b.dtype));
        }
        Ok([m as usize, n as usize, k as usize])
    }

    fn key(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        let desc = Desc { bias_at: 0, ..self.desc };
        (desc, self.a, self.b, self.c, self.d).hash(&mut hasher);
        hasher.finish()
    }

    /// The one algorithm there is. It wants a workspace where it may have one.
    pub fn algorithm(&self, preference: &Preference) -> Result<Algorithm, Fail> {
        self.sizes()?;
        let Preference { workspace, alignment } = *preference;
        Ok(Algorithm { problem: self.key(), workspace: workspace.min(4096), alignment, unused: [0; 4] })
    }

    pub fn accepts(&self, algorithm: &Algorithm, addresses: [u64; 4], workspace: u64) -> Result<(), Fail> {
        self.sizes()?;
        if algorithm.problem != self.key() {
            return Err(fail!(NOT_SUPPORTED, "the algorithm was asked for another product"));
        }
        if workspace < algorithm.workspace {
            return Err(fail!(INVALID_VALUE, "a workspace of {workspace} bytes, not {}", algorithm.workspace));
        }
        for (address, alignment) in addresses.into_iter().zip(algorithm.alignment) {
            if !address.is_multiple_of(u64::from(alignment.max(1))) {
                return Err(fail!(NOT_SUPPORTED, "{address:#x} is not aligned to {alignment} bytes, as was promised"));
            }
        }
        Ok(())
    }
}

/// A product with its operands: `d = alpha * op(a) * op(b) + beta * c + bias`.
pub struct Product {
    pub problem: Problem,
    pub alpha: f32,
    pub beta: f32,
    pub a: u64,
    pub b: u64,
    pub c: u64,
    pub d: u64,
    pub workspace: (u64, u64),
}

impl Product {
    /// Device memory that is touched.
    pub fn ranges(&self) -> Vec<(u64, u64)> {
        let Problem { desc, a, b, c, d } = &self.problem;
        let mut ranges = vec![(self.a, a.bytes()), (self.b, b.bytes()), (self.d, d.bytes())];
        if self.beta != 0.0 {
            ranges.push((self.c, c.bytes()));
        }
        if desc.bias {
            ranges.push((desc.bias_at, d.rows * desc.bias_dtype.unwrap_or(d.dtype).bytes()));
        }
        if self.workspace.1 > 0 {
            ranges.push(self.workspace);
        }
        ranges
    }

    /// Computes now; the ranges are live and open. What the workspace held is lost.
    pub fn run(&self) {
        // SAFETY: the range is live and open.
        unsafe { std::ptr::write_bytes(self.workspace.0 as *mut u8, 0xff, self.workspace.1 as usize) };
        (0..self.problem.d.batch as i64).for_each(|at| self.run_one(at));
    }

    fn run_one(&self, at: i64) {
        let Problem { desc, a, b, c, d } = &self.problem;
        let [m, n, k] = self.problem.sizes().expect("checked at the call");
        let one = |layout: &Layout, address: u64| {
            let start = address + (at * layout.stride) as u64 * layout.dtype.bytes();
            widen(&Layout { batch: 1, ..*layout }, start)
        };
        // Rows of op(a) and columns of op(b), each contiguous.
        let rows = vectors(&one(a, self.a), a.ld as usize, m, k, desc.trans_a);
        let columns = vectors(&one(b, self.b), b.ld as usize, n, k, !desc.trans_b);
        let before = (self.beta != 0.0).then(|| one(c, self.c));
        let bias = desc.bias.then(|| {
            let dtype = desc.bias_dtype.unwrap_or(d.dtype);
            widen(&Layout { dtype, rows: m as u64, cols: 1, ld: m as i64, batch: 1, stride: 0 }, desc.bias_at)
        });
        let column = |j: usize| -> Vec<f32> {
            let value = |i: usize| {
                let mut value = self.alpha * dot(&rows[i * k..][..k], &columns[j * k..][..k]);
                if let Some(before) = &before {
                    value += self.beta * before[j * c.ld as usize + i];
                }
                value + bias.as_ref().map_or(0.0, |bias| bias[i])
            };
            (0..m).map(value).collect()
        };
        let half = if m * n * k > 1 << 20 { n.div_ceil(2) } else { n };
        let result: Vec<Vec<f32>> = thread::scope(|scope| {
            let later = (half < n).then(|| scope.spawn(|| (half..n).map(column).collect::<Vec<_>>()));
            let mut result: Vec<_> = (0..half).map(column).collect();
            result.extend(later.map_or(Vec::new(), |later| later.join().expect("arithmetic does not panic")));
            result
        });
        let start = self.d + (at * d.stride) as u64 * d.dtype.bytes();
        for (j, column) in result.iter().enumerate() {
            narrow(d.dtype, column, start + (j as u64 * d.ld as u64) * d.dtype.bytes());
        }
    }
}

/// `count` vectors of `depth`: columns of a matrix as they lie, or its rows gathered.
fn vectors(matrix: &[f32], ld: usize, count: usize, depth: usize, are_columns: bool) -> Vec<f32> {
    let mut vectors = Vec::with_capacity(count * depth);
    for i in 0..count {
        if are_columns {
            vectors.extend_from_slice(&matrix[i * ld..][..depth]);
        } else {
            vectors.extend((0..depth).map(|l| matrix[l * ld + i]));
        }
    }
    vectors
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 16];
    let (chunks_a, chunks_b) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: f32 = chunks_a.remainder().iter().zip(chunks_b.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in chunks_a.zip(chunks_b) {
        (0..16).for_each(|i| sums[i] += a[i] * b[i]);
    }
    sums.iter().sum::<f32>() + rest
}

/// The elements of a matrix and what lies between its columns.
fn widen(layout: &Layout, at: u64) -> Vec<f32> {
    let count = (layout.bytes() / layout.dtype.bytes()) as usize;
    // SAFETY: the product's ranges were checked to be live, and are open.
    unsafe {
        match layout.dtype {
            DType::F32 => std::slice::from_raw_parts(at as *const f32, count).to_vec(),
            DType::F16 => std::slice::from_raw_parts(at as *const f16, count).iter().map(|v| v.to_f32()).collect(),
            DType::BF16 => std::slice::from_raw_parts(at as *const bf16, count).iter().map(|v| v.to_f32()).collect(),
        }
    }
}

fn narrow(dtype: DType, values: &[f32], at: u64) {
    for (i, &value) in values.iter().enumerate() {
        // SAFETY: as in `widen`.
        unsafe {
            match dtype {
                DType::F32 => (at as *mut f32).add(i).write(value),
                DType::F16 => (at as *mut f16).add(i).write(f16::from_f32(value)),
                DType::BF16 => (at as *mut bf16).add(i).write(bf16::from_f32(value)),
            }
        }
    }
}
