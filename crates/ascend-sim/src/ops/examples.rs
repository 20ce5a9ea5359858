//! Four operators that show how one is declared.

use crate::{
    array::{Array, Chip, Fault, Meta, Refusal},
    constants::*,
    machine::refusal,
    meta::Scalar,
    op::{Kernel, Out, Ref, Tensor, operator},
    runtime::Runtime,
};

operator! {
    /// out = self in another dtype.
    Cast = aclnnCast, aclnnCastGetWorkspaceSize (source: Tensor, dtype: i32, out: Out)
}

impl Kernel for Cast {
    fn check(&self, _: Chip) -> Result<(), Refusal> {
        same_shape(&self.source, &self.out)?;
        if self.dtype != self.out.dtype {
            return Err(refusal!(ACLNN_ERR_PARAM_INVALID, "dtype {} for an output of {}", self.dtype, self.out.dtype));
        }
        Ok(())
    }

    fn run(&self, runtime: &mut Runtime) -> Result<(), Fault> {
        convert(runtime, &self.source, &self.out)
    }
}

operator! {
    /// selfRef = src, broadcast, in selfRef's dtype.
    InplaceCopy = aclnnInplaceCopy, aclnnInplaceCopyGetWorkspaceSize (target: Ref, source: Tensor)
}

impl Kernel for InplaceCopy {
    fn check(&self, _: Chip) -> Result<(), Refusal> {
        broadcast(&self.source, &self.target.dims).map(drop)
    }

    fn run(&self, runtime: &mut Runtime) -> Result<(), Fault> {
        let source = broadcast(&self.source, &self.target.dims).expect("checked in phase 1");
        convert(runtime, &source, &self.target)
    }
}

operator! {
    /// out = self + alpha * other, broadcast.
    Add = aclnnAdd, aclnnAddGetWorkspaceSize (a: Tensor, b: Tensor, alpha: Scalar, out: Out)
}

impl Kernel for Add {
    fn check(&self, _: Chip) -> Result<(), Refusal> {
        broadcast(&self.a, &self.out.dims)?;
        broadcast(&self.b, &self.out.dims).map(drop)
    }

    fn run(&self, runtime: &mut Runtime) -> Result<(), Fault> {
        let alpha = self.alpha.to_f64() as f32;
        let mut a = runtime.load(&broadcast(&self.a, &self.out.dims).expect("checked in phase 1"))?;
        let b = runtime.load(&broadcast(&self.b, &self.out.dims).expect("checked in phase 1"))?;
        a.data.iter_mut().zip(&b.data).for_each(|(a, b)| *a += alpha * b);
        runtime.store(&self.out, &a)
    }
}

operator! {
    /// out = self x mat2, two-dimensional.
    Mm = aclnnMm, aclnnMmGetWorkspaceSize (a: Tensor, b: Tensor, out: Out, cube_math_type: i8)
}

impl Kernel for Mm {
    fn check(&self, _: Chip) -> Result<(), Refusal> {
        let (a, b, out) = (&self.a.dims, &self.b.dims, &self.out.dims);
        if a.len() != 2 || b.len() != 2 || out.len() != 2 || a[1] != b[0] || *out != [a[0], b[1]] {
            return Err(refusal!(ACLNN_ERR_PARAM_INVALID, "{a:?} x {b:?} to {out:?}"));
        }
        Ok(())
    }

    fn run(&self, runtime: &mut Runtime) -> Result<(), Fault> {
        let (a, b) = (runtime.load(&self.a)?, runtime.load(&self.b.transposed())?);
        let k = a.dims[1];
        let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(x * y)).sum::<f64>() as f32;
        let rows = a.data.chunks_exact(k);
        let data = rows.flat_map(|x| b.data.chunks_exact(k).map(move |y| dot(x, y))).collect();
        runtime.store(&self.out, &Array { dims: self.out.shape(), data })
    }
}

/// Copies elements from one dtype to another; integers stay exact.
fn convert(runtime: &mut Runtime, source: &Tensor, target: &Tensor) -> Result<(), Fault> {
    if crate::dtype::is_float(source.dtype) {
        let values = runtime.load(source)?;
        return runtime.store(target, &values);
    }
    let values = runtime.load_ints(source)?;
    runtime.store_ints(target, &values)
}

fn same_shape(a: &Meta, b: &Meta) -> Result<(), Refusal> {
    if a.dims == b.dims {
        return Ok(());
    }
    Err(refusal!(ACLNN_ERR_PARAM_INVALID, "shapes {:?} and {:?} differ", a.dims, b.dims))
}

/// The tensor seen with the shape `dims`: dimensions of one, and those in front that it lacks, are repeated.
fn broadcast(tensor: &Tensor, dims: &[i64]) -> Result<Tensor, Refusal> {
    let lacking = dims.len().checked_sub(tensor.rank());
    let refused = || refusal!(ACLNN_ERR_PARAM_INVALID, "shape {:?} does not broadcast to {dims:?}", tensor.dims);
    let lacking = lacking.ok_or_else(refused)?;
    let mut strides = vec![0; lacking];
    for ((&from, &to), &stride) in tensor.dims.iter().zip(&dims[lacking..]).zip(&tensor.strides) {
        match from {
            _ if from == to => strides.push(stride),
            1 => strides.push(0),
            _ => return Err(refused()),
        }
    }
    Ok(tensor.view(dims.to_vec(), strides, tensor.offset))
}
