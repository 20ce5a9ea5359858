//! Arguments of operators: what each type is in the C ABI, and how it is read.
//!
//! Invariant: what an operator holds was copied in phase 1; only the addresses of its tensors are looked up when it runs, by slot.

use std::{
    ffi::{CStr, c_char, c_void},
    ops::Deref,
};

use crate::{
    array::{Meta, Refusal},
    constants::*,
    machine::refusal,
    meta::{Objects, Scalar, Values},
    table::Kind,
};

/// Whether an operand is read, written, or both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    In,
    Out,
    InOut,
}

/// A tensor among the arguments of a call.
pub struct Operand {
    pub name: &'static str,
    pub meta: Meta,
    pub address: u64,
    pub role: Role,
}

/// Collects operands while the arguments are read.
pub struct Binder<'a> {
    objects: &'a Objects,
    operands: Vec<Operand>,
    used: Vec<u64>,
}

impl<'a> Binder<'a> {
    pub fn new(objects: &'a Objects) -> Self {
        Self { objects, operands: Vec::new(), used: Vec::new() }
    }

    pub fn finish(self) -> (Vec<Operand>, Vec<u64>) {
        (self.operands, self.used)
    }

    fn tensor(&mut self, handle: u64, name: &'static str, role: Role) -> Result<Tensor, Refusal> {
        let object = self.objects.tensors.get(handle).map_err(|r| named(name, r))?;
        let meta = object.meta.clone();
        self.used.push(handle);
        self.operands.push(Operand { name, meta: meta.clone(), address: object.address, role });
        Ok(Tensor { meta, slot: self.operands.len() - 1 })
    }
}

/// A refusal of a handle, as an operator says it.
fn named(name: &str, refusal: Refusal) -> Refusal {
    refusal!(ACLNN_ERR_PARAM_INVALID, "{name}: {}", refusal.message)
}

/// How an argument comes out of the C ABI.
pub trait Arg: Sized + Send + Sync + 'static {
    /// The type of the parameter.
    type Raw;

    /// # Safety
    /// `raw` is what the C ABI allows for the parameter: a string that ends in zero, or null; handles are not followed.
    unsafe fn bind(raw: Self::Raw, name: &'static str, binder: &mut Binder) -> Result<Self, Refusal>;
}

/// An input tensor: its view, and where its address is looked up.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub meta: Meta,
    pub slot: usize,
}

impl Tensor {
    /// Another view of the same memory; strides and offset in elements from the tensor's address.
    pub fn view(&self, dims: Vec<i64>, strides: Vec<i64>, offset: i64) -> Self {
        Self { meta: Meta { dims, strides, offset, ..self.meta.clone() }, slot: self.slot }
    }

    /// One entry of the first dimension, as a tensor of the others.
    pub fn at(&self, index: i64) -> Self {
        self.view(self.dims[1..].to_vec(), self.strides[1..].to_vec(), self.offset + index * self.strides[0])
    }

    /// The view with its last two dimensions swapped.
    pub fn transposed(&self) -> Self {
        let (mut dims, mut strides, rank) = (self.dims.clone(), self.strides.clone(), self.rank());
        dims.swap(rank - 2, rank - 1);
        strides.swap(rank - 2, rank - 1);
        self.view(dims, strides, self.offset)
    }
}

impl Deref for Tensor {
    type Target = Meta;
    fn deref(&self) -> &Meta {
        &self.meta
    }
}

/// An output tensor.
#[derive(Clone, Debug)]
pub struct Out(pub Tensor);

/// A tensor that is read and written in place.
#[derive(Clone, Debug)]
pub struct Ref(pub Tensor);

macro_rules! wraps_tensor {
    ($($ty:ident),*) => {
        $(impl Deref for $ty {
            type Target = Tensor;
            fn deref(&self) -> &Tensor {
                &self.0
            }
        })*
    };
}
wraps_tensor!(Out, Ref);

/// An argument that is a pointer to an object, and not null.
macro_rules! handles {
    ($($ty:ty: |$handle:ident, $name:ident, $binder:ident| $read:expr;)*) => {
        $(
            impl Arg for $ty {
                type Raw = *const c_void;

                unsafe fn bind(raw: *const c_void, $name: &'static str, $binder: &mut Binder) -> Result<Self, Refusal> {
                    let $handle = raw as u64;
                    if raw.is_null() {
                        return Err(refusal!(ACLNN_ERR_PARAM_NULLPTR, "{} is null", $name));
                    }
                    $read
                }
            }

            impl Arg for Option<$ty> {
                type Raw = *const c_void;

                unsafe fn bind(raw: *const c_void, name: &'static str, binder: &mut Binder) -> Result<Self, Refusal> {
                    if raw.is_null() {
                        return Ok(None);
                    }
                    // SAFETY: the caller's promise is handed on.
                    unsafe { <$ty>::bind(raw, name, binder) }.map(Some)
                }
            }
        )*
    };
}

handles! {
    Tensor: |handle, name, binder| binder.tensor(handle, name, Role::In);
    Out: |handle, name, binder| binder.tensor(handle, name, Role::Out).map(Out);
    Ref: |handle, name, binder| binder.tensor(handle, name, Role::InOut).map(Ref);
    Vec<Tensor>: |handle, name, binder| {
        elements(handle, name, binder)?.into_iter().map(|e| binder.tensor(e, name, Role::In)).collect()
    };
    Vec<Out>: |handle, name, binder| {
        elements(handle, name, binder)?.into_iter().map(|e| binder.tensor(e, name, Role::Out).map(Out)).collect()
    };
    Scalar: |handle, name, binder| {
        binder.used.push(handle);
        binder.objects.scalars.get(handle).copied().map_err(|r| named(name, r))
    };
    Vec<i64>: |handle, name, binder| match array(handle, name, binder)? {
        Values::Ints(values) => Ok(values),
        _ => Err(refusal!(ACLNN_ERR_PARAM_INVALID, "{name} is no aclIntArray")),
    };
    Vec<f32>: |handle, name, binder| match array(handle, name, binder)? {
        Values::Floats(values) => Ok(values),
        _ => Err(refusal!(ACLNN_ERR_PARAM_INVALID, "{name} is no aclFloatArray")),
    };
    Vec<bool>: |handle, name, binder| match array(handle, name, binder)? {
        Values::Bools(values) => Ok(values),
        _ => Err(refusal!(ACLNN_ERR_PARAM_INVALID, "{name} is no aclBoolArray")),
    };
}

fn array(handle: u64, name: &'static str, binder: &mut Binder) -> Result<Values, Refusal> {
    binder.used.push(handle);
    binder.objects.arrays.get(handle).cloned().map_err(|r| named(name, r))
}

fn elements(handle: u64, name: &'static str, binder: &mut Binder) -> Result<Vec<u64>, Refusal> {
    binder.used.push(handle);
    let list = binder.objects.lists.get(handle).map_err(|r| named(name, r))?;
    match list.kind {
        Kind::Tensor => Ok(list.elements.clone()),
        _ => Err(refusal!(ACLNN_ERR_PARAM_INVALID, "{name} is no aclTensorList")),
    }
}

macro_rules! plain {
    ($($ty:ty),*) => {
        $(impl Arg for $ty {
            type Raw = $ty;

            unsafe fn bind(raw: $ty, _: &'static str, _: &mut Binder) -> Result<Self, Refusal> {
                Ok(raw)
            }
        })*
    };
}
// `int`, `aclDataType` and other enums are i32.
plain!(i8, i32, i64, f32, f64, bool);

impl Arg for Option<String> {
    type Raw = *const c_char;

    unsafe fn bind(raw: *const c_char, name: &'static str, _: &mut Binder) -> Result<Self, Refusal> {
        if raw.is_null() {
            return Ok(None);
        }
        // SAFETY: by the caller's word the string ends in zero.
        let text = unsafe { CStr::from_ptr(raw) }.to_str();
        text.map(|text| Some(text.to_owned())).map_err(|_| refusal!(ACLNN_ERR_PARAM_INVALID, "{name} is not UTF-8"))
    }
}

impl Arg for String {
    type Raw = *const c_char;

    unsafe fn bind(raw: *const c_char, name: &'static str, binder: &mut Binder) -> Result<Self, Refusal> {
        // SAFETY: the caller's promise is handed on.
        let text = unsafe { Option::<String>::bind(raw, name, binder) }?;
        text.ok_or_else(|| refusal!(ACLNN_ERR_PARAM_NULLPTR, "{name} is null"))
    }
}
