//! Products of dense matrices. A weight may be in blocks (FRACTAL_NZ): then its view says what the matrix is, and its
//! storage has the shape of the blocks; a weight in blocks that is passed as an ordinary one gives garbage.

use half::f16;

use super::view::{dense, fix, shaped, store};
use crate::{
    array::{Chip, Fault, Refusal},
    constants::*,
    dtype,
    limits::{Seen, check, need, numbers, valid},
    math::{
        matmul::{Order, matmul, to_hf32},
        nz::{block_cols, block_dims, from_blocks},
        shape::broadcast,
    },
    op::{Kernel, Out, Tensor, operator},
    runtime::Runtime,
};

/// `cubeMathType`: how operands are rounded before they are multiplied.
const CUBE_ALLOW_DOWN: i8 = 1;
const CUBE_FP16: i8 = 2;
const CUBE_HF32: i8 = 3;

fn check_cube(chip: Chip, cube: i8, dtype: i32) -> Result<(), Refusal> {
    let numbers = numbers(chip);
    let taken = if i64::from(dtype) == ACL_FLOAT { numbers.cube_f32 } else { numbers.cube_narrow };
    valid(taken.contains(&cube), || format!("cubeMathType {cube} with aclDataType {dtype}: one of {taken:?}"))?;
    let bf16 = i64::from(dtype) == ACL_BF16 && cube == CUBE_FP16;
    valid(!bf16, || "cubeMathType 2 computes in f16, which bf16 operands cannot be".to_owned())
}

/// Rounds f32 operands to what the chip multiplies.
fn to_cube(chip: Chip, cube: i8, dtype: i32, data: &mut [f32]) {
    let narrow: fn(f32) -> f32 = match (chip, cube) {
        _ if i64::from(dtype) != ACL_FLOAT => return,
        (Chip::P310, _) | (_, CUBE_FP16) => |x| f16::from_f32(x).to_f32(),
        (_, CUBE_ALLOW_DOWN | CUBE_HF32) => to_hf32,
        _ => return,
    };
    data.iter_mut().for_each(|x| *x = narrow(*x));
}

/// A weight in blocks: the rows and columns of the matrix that was brought into blocks, which the view may have turned.
struct Blocks {
    rows: usize,
    cols: usize,
    c: usize,
    turned: bool,
}

/// How a matrix lies in blocks; `None` if it does not, 161002 if its storage has another shape than its blocks.
fn blocks(weight: &Tensor) -> Result<Option<Blocks>, Refusal> {
    if i64::from(weight.format) != ACL_FORMAT_FRACTAL_NZ {
        return Ok(None);
    }
    valid(weight.rank() == 2, || format!("{:?} in FRACTAL_NZ: two dimensions", weight.dims))?;
    let turned = !weight.is_contiguous();
    let [rows, cols] = [weight.dims[usize::from(turned)] as usize, weight.dims[usize::from(!turned)] as usize];
    let c = block_cols(dtype::bytes(weight.dtype, 1) as usize);
    let want = block_dims(rows, cols, c).map(|d| d as i64);
    valid(weight.storage == want, || {
        format!("a matrix [{rows}, {cols}] has the storage {want:?} in FRACTAL_NZ, not {:?}", weight.storage)
    })?;
    Ok(Some(Blocks { rows, cols, c, turned }))
}

/// The columns `[n, k]` of a matrix `[k, n]`.
fn columns(rt: &Runtime, b: &Tensor) -> Result<Vec<f32>, Fault> {
    let Some(blocks) = blocks(b).expect("checked in phase 1") else {
        return Ok(rt.load(&b.transposed())?.data);
    };
    let all = rt.load(&dense(b, &b.storage))?.data;
    let Blocks { rows, cols, c, turned } = blocks;
    let matrix = from_blocks(&all, rows, cols, c);
    Ok(if turned { matrix } else { turn(&matrix, rows, cols) })
}

/// A matrix `[rows, cols]` as `[cols, rows]`.
fn turn(matrix: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..cols).flat_map(|j| (0..rows).map(move |i| matrix[i * cols + j])).collect()
}

/// A product of stacks of matrices: `[.., m, k]` times `[.., k, n]`, where stacks broadcast.
struct Product<'a> {
    a: Tensor,
    b: Tensor,
    out: &'a Tensor,
    cube: i8,
}

impl Product<'_> {
    /// A vector on the left is a matrix of one row, on the right one of one column.
    fn new<'a>(a: &Tensor, b: &Tensor, out: &'a Tensor, cube: i8) -> Result<Product<'a>, Refusal> {
        let some = a.rank() > 0 && b.rank() > 0;
        valid(some && a.rank() <= 6 && b.rank() <= 6, || format!("{:?} x {:?}: 1 to 6 dimensions", a.dims, b.dims))?;
        let row = a.rank() == 1;
        let column = b.rank() == 1;
        let a = if row { a.view(vec![1, a.dims[0]], vec![0, a.strides[0]], a.offset) } else { a.clone() };
        let b = if column { b.view(vec![b.dims[0], 1], vec![b.strides[0], 0], b.offset) } else { b.clone() };
        let (stack_a, [m, k]) = split(&a.dims);
        let (stack_b, [k_b, n]) = split(&b.dims);
        valid(k == k_b, || format!("{:?} x {:?}: the inner dimensions differ", a.dims, b.dims))?;
        let stack = broadcast(stack_a, stack_b);
        valid(stack.is_some(), || format!("{:?} x {:?}: the outer dimensions do not broadcast", a.dims, b.dims))?;
        let tail = [m, n].into_iter().zip([row, column]).filter(|(_, dropped)| !dropped).map(|(d, _)| d);
        shaped("out", out, &stack.unwrap_or_default().into_iter().chain(tail).collect::<Vec<_>>())?;
        Ok(Product { a, b, out, cube })
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        let (stack_a, [m, k]) = split(&self.a.dims);
        let (stack_b, [_, n]) = split(&self.b.dims);
        let one_b = stack_b.iter().product::<i64>() == 1;
        let mut a = rt.load(&self.a)?.data;
        to_cube(rt.chip, self.cube, self.a.dtype, &mut a);
        let weight = |rt: &Runtime, position: usize| {
            let mut columns = columns(rt, &fix(&self.b, 0..stack_b.len(), position))?;
            to_cube(rt.chip, self.cube, self.b.dtype, &mut columns);
            Ok(columns)
        };
        let (m, n, k) = (m as usize, n as usize, k as usize);
        if one_b {
            // All rows of the stack meet the same matrix.
            let order = Order::of(rt.perturb, a.len() / k);
            let columns = weight(rt, 0)?;
            return store(rt, self.out, matmul(&a, &columns, k, order));
        }
        let stack = broadcast(stack_a, stack_b).expect("checked in phase 1");
        let mut out = Vec::with_capacity(stack.iter().product::<i64>() as usize * m * n);
        for position in 0..stack.iter().product::<i64>() as usize {
            let rows = &a[within(&stack, stack_a, position) * m * k..][..m * k];
            let columns = weight(rt, within(&stack, stack_b, position))?;
            out.extend(matmul(rows, &columns, k, Order::of(rt.perturb, m)));
        }
        store(rt, self.out, out)
    }
}

/// The stack of a shape, and its matrices.
fn split(dims: &[i64]) -> (&[i64], [i64; 2]) {
    let (stack, matrix) = dims.split_at(dims.len() - 2);
    (stack, [matrix[0], matrix[1]])
}

/// Which matrix of a stack of shape `own` stands at a position of the shape that it broadcasts to.
fn within(stack: &[i64], own: &[i64], mut position: usize) -> usize {
    let (mut at, mut step) = (0, 1);
    for (d, &len) in stack.iter().enumerate().rev() {
        let index = position % len as usize;
        position /= len as usize;
        if let Some(&own) = (d + own.len()).checked_sub(stack.len()).map(|d| &own[d]) {
            at += if own == 1 { 0 } else { index * step };
            step *= own as usize;
        }
    }
    at
}

fn check_product(chip: Chip, name: &str, a: &Tensor, b: &Tensor, out: &Out, cube: i8) -> Result<(), Refusal> {
    check(chip, name, &[a, b, out as &dyn Seen])?;
    check_cube(chip, cube, a.dtype)?;
    blocks(b)?;
    Product::new(a, b, out, cube).map(drop)
}

/// A product that demands `$rank` dimensions of both operands, if any.
macro_rules! product {
    ($op:ident, $execute:ident, $prepare:ident, $rank:expr) => {
        operator! {
            /// out = self x mat2.
            $op = $execute, $prepare (this: Tensor, mat2: Tensor, out: Out, cube_math_type: i8)
        }

        impl Kernel for $op {
            fn check(&self, chip: Chip) -> Result<(), Refusal> {
                let (a, b, rank): (_, _, Option<usize>) = (self.this.rank(), self.mat2.rank(), $rank);
                valid(rank.is_none_or(|r| a == r && b == r), || {
                    format!("operands of {a} and {b} dimensions, not {rank:?}")
                })?;
                check_product(chip, stringify!($op), &self.this, &self.mat2, &self.out, self.cube_math_type)
            }

            fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
                let product = Product::new(&self.this, &self.mat2, &self.out, self.cube_math_type);
                product.expect("checked in phase 1").run(rt)
            }
        }
    };
}

product!(Mm, aclnnMm, aclnnMmGetWorkspaceSize, Some(2));
product!(Matmul, aclnnMatmul, aclnnMatmulGetWorkspaceSize, None);
product!(BatchMatMul, aclnnBatchMatMul, aclnnBatchMatMulGetWorkspaceSize, Some(3));

operator! {
    /// out = self x mat2, which is in FRACTAL_NZ.
    MatmulWeightNz = aclnnMatmulWeightNz, aclnnMatmulWeightNzGetWorkspaceSize
        (this: Tensor, mat2: Tensor, out: Out, cube_math_type: i8)
}

impl Kernel for MatmulWeightNz {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        check_product(chip, "MatmulWeightNz", &self.this, &self.mat2, &self.out, self.cube_math_type)?;
        valid(blocks(&self.mat2)?.is_some(), || "mat2 is not in FRACTAL_NZ".to_owned())?;
        let thin = self.mat2.dims.contains(&1);
        need(!thin, ACLNN_ERR_PARAM_INVALID, || format!("mat2 {:?}: a single row or column", self.mat2.dims))
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        let product = Product::new(&self.this, &self.mat2, &self.out, self.cube_math_type);
        product.expect("checked in phase 1").run(rt)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{
        bench::{BF16, Bench, F16, F32, near, numbers, reshaped, turned},
        view::narrow,
    };

    fn plainly(a: &[f32], b: &[f32], [m, k, n]: [usize; 3]) -> Vec<f32> {
        let at =
            |i: usize, j: usize| (0..k).map(|x| f64::from(a[i * k + x]) * f64::from(b[x * n + j])).sum::<f64>() as f32;
        (0..m).flat_map(|i| (0..n).map(move |j| at(i, j))).collect()
    }

    fn mm(this: &Tensor, mat2: &Tensor, out: &Out, cube_math_type: i8) -> Mm {
        Mm { this: this.clone(), mat2: mat2.clone(), out: out.clone(), cube_math_type }
    }

    #[test]
    fn a_product_is_the_same_for_a_matrix_and_its_turned_view() {
        let b = Bench::new(Chip::A2);
        let (x, w) = (numbers(3 * 20, 1), numbers(20 * 5, 2));
        let (a, mat2, out) = (b.floats(&[3, 20], F32, &x), b.floats(&[20, 5], F32, &w), b.out(&[3, 5], F32));
        b.run(&mm(&a, &mat2, &out, 0)).unwrap();
        assert!(near(&b.read(&out), &plainly(&x, &w, [3, 20, 5]), 1e-5));
        let stored = b.floats(&[5, 20], F32, &turn(&w, 20, 5));
        let again = b.out(&[3, 5], F32);
        b.run(&mm(&a, &turned(&stored), &again, 0)).unwrap();
        assert_eq!(b.read(&again), b.read(&out));
        assert_eq!(b.check(&mm(&a, &stored, &out, 0)), 161_002);
    }

    #[test]
    fn stacks_of_matrices_broadcast() {
        let b = Bench::new(Chip::A2);
        let (x, w) = (numbers(2 * 3 * 4, 1), numbers(2 * 4 * 5, 2));
        let (a, mat2) = (b.floats(&[2, 3, 4], F32, &x), b.floats(&[2, 4, 5], F32, &w));
        let out = b.out(&[2, 3, 5], F32);
        let each: Vec<f32> = (0..2).flat_map(|i| plainly(&x[i * 12..][..12], &w[i * 20..][..20], [3, 4, 5])).collect();
        b.run(&BatchMatMul { this: a.clone(), mat2: mat2.clone(), out: out.clone(), cube_math_type: 0 }).unwrap();
        assert!(near(&b.read(&out), &each, 1e-5));
        let one = Tensor { meta: reshaped(&mat2, &[1, 4, 5]).meta, ..mat2.clone() };
        let shared: Vec<f32> = (0..2).flat_map(|i| plainly(&x[i * 12..][..12], &w[..20], [3, 4, 5])).collect();
        b.run(&Matmul { this: a.clone(), mat2: one, out: out.clone(), cube_math_type: 0 }).unwrap();
        assert!(near(&b.read(&out), &shared, 1e-5));
        let wide = b.out(&[2, 2, 3, 5], F32);
        let (tall, flat) = (reshaped(&a, &[2, 1, 3, 4]), reshaped(&mat2, &[2, 4, 5]));
        b.run(&Matmul { this: tall, mat2: flat, out: wide.clone(), cube_math_type: 0 }).unwrap();
        assert!(near(&b.read(&wide)[15..30], &plainly(&x[..12], &w[20..], [3, 4, 5]), 1e-5));
        let three = b.empty(&[3, 4, 5], F32);
        assert_eq!(b.check(&BatchMatMul { this: a, mat2: three, out, cube_math_type: 0 }), 161_002);
    }

    #[test]
    fn vectors_lose_their_dimension() {
        let b = Bench::new(Chip::A2);
        let (v, m) = (b.floats(&[2], F32, &[1.0, 2.0]), b.floats(&[2, 3], F32, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
        let out = b.out(&[3], F32);
        b.run(&Matmul { this: v.clone(), mat2: m, out: out.clone(), cube_math_type: 0 }).unwrap();
        assert_eq!(b.read(&out), [9.0, 12.0, 15.0]);
        let dot = b.out(&[], F32);
        b.run(&Matmul { this: v.clone(), mat2: v, out: dot.clone(), cube_math_type: 0 }).unwrap();
        assert_eq!(b.read(&dot), [5.0]);
    }

    #[test]
    fn f32_operands_are_rounded_as_the_chip_and_the_cube_type_say() {
        let fine = 1.0 + 2f32.powi(-12);
        for (chip, cube, want) in [
            (Chip::A2, 0, Ok(fine)),
            (Chip::A2, 1, Ok(1.0)),
            (Chip::A2, 2, Ok(1.0)),
            (Chip::A2, 3, Ok(1.0)),
            (Chip::A2, 4, Err(161_002)),
            (Chip::P310, 0, Err(161_002)),
            (Chip::P310, 1, Ok(1.0)),
            (Chip::P310, 2, Ok(1.0)),
            (Chip::P310, 3, Err(161_002)),
        ] {
            let b = Bench::new(chip);
            let (x, one, out) = (b.floats(&[1, 1], F32, &[fine]), b.floats(&[1, 1], F32, &[1.0]), b.out(&[1, 1], F32));
            let product = mm(&x, &one, &out, cube);
            match want {
                Err(code) => assert_eq!(b.check(&product), code, "{chip:?} {cube}"),
                Ok(value) => {
                    b.run(&product).unwrap();
                    assert_eq!(b.read(&out), [value], "{chip:?} {cube}");
                }
            }
        }
        let b = Bench::new(Chip::A2);
        let (x, out) = (b.empty(&[1, 1], BF16), b.out(&[1, 1], BF16));
        assert_eq!((b.check(&mm(&x, &x, &out, 2)), b.check(&mm(&x, &x, &out, 0))), (161_002, 0));
    }

    #[test]
    fn narrow_operands_are_summed_in_f32() {
        let b = Bench::new(Chip::A2);
        let (x, ones, out) =
            (b.floats(&[1, 4096], F16, &[1.0; 4096]), b.floats(&[4096, 1], F16, &[1.0; 4096]), b.out(&[1, 1], F16));
        b.run(&mm(&x, &ones, &out, 0)).unwrap();
        assert_eq!(b.read(&out), [4096.0]);
    }

    #[test]
    fn a_row_keeps_its_bits_in_a_batch_unless_sums_are_perturbed() {
        for perturb in [false, true] {
            let mut b = Bench::new(Chip::A2);
            b.perturb = perturb;
            let data: Vec<f32> = numbers(8 * 203, 1).iter().map(|x| x / 3.0).collect();
            let (x, w) = (b.floats(&[8, 203], F32, &data), b.floats(&[203, 31], F32, &numbers(203 * 31, 5)));
            let (alone, beside) = (b.out(&[1, 31], F32), b.out(&[8, 31], F32));
            b.run(&mm(&narrow(&x, 0, 0, 1), &w, &alone, 0)).unwrap();
            b.run(&mm(&x, &w, &beside, 0)).unwrap();
            let (alone, beside) = (b.read(&alone), b.read(&beside));
            assert_eq!(alone != beside[..31], perturb);
            assert!(near(&alone, &beside[..31], 1e-4));
        }
    }
}
