//! Slices taken and written by index. Indices are looked at when the operator runs: one outside its dimension is a fault.

use super::view::{axis, copy, fix, shaped};
use crate::{
    array::{Chip, Fault, Refusal},
    limits::{check, valid},
    math::moves::{row, unique_rows},
    op::{Kernel, Out, Ref, Tensor, operator},
    runtime::Runtime,
};

/// The shape of `source` with the dimensions of `index` in place of `dim`.
fn gathered(source: &Tensor, dim: usize, index: &Tensor) -> Vec<i64> {
    [&source.dims[..dim], &index.dims, &source.dims[dim + 1..]].concat()
}

/// Copies the slices of `source` along `dim` that `index` names, in its shape, to `out`.
fn gather(rt: &mut Runtime, source: &Tensor, dim: usize, index: &Tensor, out: &Tensor) -> Result<(), Fault> {
    let rows = source.dims[dim] as usize;
    for (n, i) in rt.load_ints(index)?.data.into_iter().enumerate() {
        let slice = fix(source, dim..dim + 1, row(i, rows, "index")?);
        copy(rt, &slice, &fix(out, dim..dim + index.rank(), n))?;
    }
    Ok(())
}

operator! {
    /// Rows of a matrix by index.
    Embedding = aclnnEmbedding, aclnnEmbeddingGetWorkspaceSize (weight: Tensor, indices: Tensor, out: Out)
}

impl Kernel for Embedding {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        check(chip, "Embedding", &[&self.weight, &self.indices, &self.out])?;
        valid(self.weight.rank() == 2, || format!("weight has the shape {:?}, not [rows, width]", self.weight.dims))?;
        shaped("out", &self.out, &gathered(&self.weight, 0, &self.indices))
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        gather(rt, &self.weight, 0, &self.indices, &self.out)
    }
}

operator! {
    /// Slices along `dim` by a row of indices.
    IndexSelect = aclnnIndexSelect, aclnnIndexSelectGetWorkspaceSize (this: Tensor, dim: i64, index: Tensor, out: Out)
}

impl Kernel for IndexSelect {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        check(chip, "IndexSelect", &[&self.this, &self.index, &self.out])?;
        valid(self.index.rank() <= 1, || format!("index has the shape {:?}, not one dimension", self.index.dims))?;
        let dim = axis(&self.this, self.dim)?;
        let mut want = self.this.dims.clone();
        want[dim] = self.index.numel() as i64;
        shaped("out", &self.out, &want)
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        let index = self.index.view(
            vec![self.index.numel() as i64],
            vec![*self.index.strides.first().unwrap_or(&1)],
            self.index.offset,
        );
        gather(rt, &self.this, axis(&self.this, self.dim).expect("checked in phase 1"), &index, &self.out)
    }
}

operator! {
    /// Slices along `dim` by indices of any shape.
    GatherV2 = aclnnGatherV2, aclnnGatherV2GetWorkspaceSize (this: Tensor, dim: i64, index: Tensor, out: Out)
}

impl Kernel for GatherV2 {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        check(chip, "GatherV2", &[&self.this, &self.index, &self.out])?;
        let dim = axis(&self.this, self.dim)?;
        shaped("out", &self.out, &gathered(&self.this, dim, &self.index))
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        gather(rt, &self.this, axis(&self.this, self.dim).expect("checked in phase 1"), &self.index, &self.out)
    }
}

/// Refuses what cannot be written by index.
fn check_copy(this: &Tensor, dim: i64, index: &Tensor, source: &Tensor) -> Result<(), Refusal> {
    valid(index.rank() == 1, || format!("index has the shape {:?}, not one dimension", index.dims))?;
    shaped("source", source, &gathered(this, axis(this, dim)?, index))
}

/// Copies slices of `source` along `dim` over those of `this` that `index` names.
fn scatter(rt: &mut Runtime, this: &Tensor, dim: i64, index: &Tensor, source: &Tensor) -> Result<(), Fault> {
    let dim = axis(this, dim).expect("checked in phase 1");
    let rows = unique_rows(&rt.load_ints(index)?.data, this.dims[dim] as usize, "index")?;
    for (n, row) in rows.into_iter().enumerate() {
        copy(rt, &fix(source, dim..dim + 1, n), &fix(this, dim..dim + 1, row))?;
    }
    Ok(())
}

operator! {
    /// Slices of `source` written over those of self that `index` names.
    InplaceIndexCopy = aclnnInplaceIndexCopy, aclnnInplaceIndexCopyGetWorkspaceSize
        (this: Ref, dim: i64, index: Tensor, source: Tensor)
}

impl Kernel for InplaceIndexCopy {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        check(chip, "InplaceIndexCopy", &[&self.this, &self.index, &self.source])?;
        check_copy(&self.this, self.dim, &self.index, &self.source)
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        scatter(rt, &self.this, self.dim, &self.index, &self.source)
    }
}

operator! {
    /// The same, in a copy of self.
    IndexCopy = aclnnIndexCopy, aclnnIndexCopyGetWorkspaceSize
        (this: Ref, dim: i64, index: Tensor, source: Tensor, out: Ref)
}

impl Kernel for IndexCopy {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        check(chip, "IndexCopy", &[&self.this, &self.index, &self.source, &self.out])?;
        shaped("out", &self.out, &self.this.dims)?;
        check_copy(&self.this, self.dim, &self.index, &self.source)
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        copy(rt, &self.this, &self.out)?;
        scatter(rt, &self.out, self.dim, &self.index, &self.source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::bench::{Bench, F16, F32, I32, I64, inplace, turned};

    #[test]
    fn embedding_takes_rows_in_the_shape_of_the_indices() {
        let b = Bench::new(Chip::A2);
        let weight = b.floats(&[3, 2], F16, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        for dtype in [I32, I64] {
            let (indices, out) = (b.ints(&[2, 2], dtype, &[2, 0, 1, 2]), b.out(&[2, 2, 2], F16));
            b.run(&Embedding { weight: weight.clone(), indices, out: out.clone() }).unwrap();
            assert_eq!(b.read(&out), [5.0, 6.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        }
        let (indices, flat) = (b.empty(&[2, 2], I32), b.out(&[4, 2], F16));
        assert_eq!(b.check(&Embedding { weight, indices, out: flat }), 161_002);
    }

    #[test]
    fn slices_are_taken_along_any_dimension_of_any_view() {
        let b = Bench::new(Chip::A2);
        let x = b.ints(&[2, 3], I64, &[1, 2, 3, 4, 5, 6]);
        let (index, out) = (b.ints(&[2], I64, &[2, 1]), b.out(&[2, 2], I64));
        b.run(&IndexSelect { this: x.clone(), dim: -1, index: index.clone(), out: out.clone() }).unwrap();
        assert_eq!(b.read_ints(&out), [3, 2, 6, 5]);
        b.run(&IndexSelect { this: turned(&x), dim: 0, index: index.clone(), out: out.clone() }).unwrap();
        assert_eq!(b.read_ints(&out), [3, 6, 2, 5]);
        let (square, wide) = (b.ints(&[1, 2], I64, &[0, 0]), b.out(&[2, 1, 2], I64));
        b.run(&GatherV2 { this: x.clone(), dim: 1, index: square.clone(), out: wide.clone() }).unwrap();
        assert_eq!(b.read_ints(&wide), [1, 1, 4, 4]);
        assert_eq!(b.check(&IndexSelect { this: x.clone(), dim: 1, index: square, out: wide }), 161_002);
        assert_eq!(b.check(&IndexSelect { this: x, dim: 2, index, out }), 161_002);
    }

    #[test]
    fn slices_are_written_where_the_indices_say() {
        let b = Bench::new(Chip::A2);
        let (x, source) = (b.floats(&[3, 2], F32, &[0.0; 6]), b.floats(&[2, 2], F32, &[1.0, 2.0, 3.0, 4.0]));
        let (index, out) = (b.ints(&[2], I32, &[2, 0]), b.floats(&[3, 2], F32, &[9.0; 6]));
        let written = [3.0, 4.0, 0.0, 0.0, 1.0, 2.0];
        let copy =
            IndexCopy { this: inplace(&x), dim: 0, index: index.clone(), source: source.clone(), out: inplace(&out) };
        b.run(&copy).unwrap();
        assert_eq!((b.read(&out), b.read(&x)), (written.to_vec(), vec![0.0; 6]));
        b.run(&InplaceIndexCopy { this: inplace(&x), dim: 0, index, source: source.clone() }).unwrap();
        assert_eq!(b.read(&x), written);
        let short = b.empty(&[1], I32);
        assert_eq!(b.check(&InplaceIndexCopy { this: inplace(&x), dim: 0, index: short, source }), 161_002);
    }

    #[test]
    fn an_index_outside_faults_when_it_runs_and_not_before() {
        let b = Bench::new(Chip::A2);
        let (x, source) = (b.floats(&[3, 2], F32, &[0.0; 6]), b.floats(&[1, 2], F32, &[1.0, 2.0]));
        for (bad, fault) in [(2, false), (3, true), (-1, true)] {
            let (index, out) = (b.ints(&[1], I64, &[bad]), b.out(&[1, 2], F32));
            let take = Embedding { weight: x.clone(), indices: index.clone(), out };
            assert_eq!(matches!(b.run(&take), Err(Fault::OutOfRange(_))), fault, "{bad}");
            let put = InplaceIndexCopy { this: inplace(&x), dim: 0, index, source: source.clone() };
            assert_eq!(matches!(b.run(&put), Err(Fault::OutOfRange(_))), fault, "{bad}");
        }
        let (twice, rows) = (b.ints(&[2], I64, &[1, 1]), b.floats(&[2, 2], F32, &[1.0; 4]));
        let put = InplaceIndexCopy { this: inplace(&x), dim: 0, index: twice, source: rows };
        assert!(matches!(b.run(&put), Err(Fault::Violation(_))));
    }
}
