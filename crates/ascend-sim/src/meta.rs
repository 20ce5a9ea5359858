//! Host objects that describe operands: tensors, scalars, arrays, lists.
//!
//! Invariant: everything but a tensor's memory is copied when the object is made. A list owns its elements from then on.

use std::{collections::BTreeMap, ffi::c_void, slice};

use crate::{
    array::{Meta, Refusal, row_major},
    constants::*,
    dtype,
    machine::{Machine, Needs, call, refusal},
    op::Executor,
    table::{Kind, Table},
};

/// Dimensions that a tensor may have.
pub const MAX_DIMS: u64 = 8;
/// Bytes on which a tensor's memory must start.
const TENSOR_ALIGNMENT: u64 = 32;

pub struct TensorObject {
    pub meta: Meta,
    pub address: u64,
}

/// A value of the host, in the widest form of its class.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scalar {
    pub dtype: i32,
    float: f64,
    int: i64,
}

impl Scalar {
    /// A scalar of the host's, for tests of single operators.
    #[cfg(test)]
    pub fn from_f64(value: f64) -> Self {
        Self { dtype: ACL_DOUBLE as i32, float: value, int: value as i64 }
    }

    pub fn to_f64(self) -> f64 {
        self.float
    }

    pub fn to_i64(self) -> i64 {
        self.int
    }
}

/// The values of an `aclIntArray`, `aclFloatArray` or `aclBoolArray`.
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    Ints(Vec<i64>),
    Floats(Vec<f32>),
    Bools(Vec<bool>),
}

/// The handles of a list's elements.
pub struct List {
    pub kind: Kind,
    pub elements: Vec<u64>,
}

pub struct Objects {
    pub tensors: Table<TensorObject>,
    pub scalars: Table<Scalar>,
    pub arrays: Table<Values>,
    pub lists: Table<List>,
    pub executors: Table<Executor>,
    /// The list that owns an element.
    pub owners: BTreeMap<u64, u64>,
}

impl Objects {
    pub fn new() -> Self {
        Self {
            tensors: Table::new(Kind::Tensor),
            scalars: Table::new(Kind::Scalar),
            arrays: Table::new(Kind::Array),
            lists: Table::new(Kind::List),
            executors: Table::new(Kind::Executor),
            owners: BTreeMap::new(),
        }
    }

    /// Whether a handle of any kind of operand is live.
    pub fn contains(&self, handle: u64) -> bool {
        self.tensors.contains(handle)
            || self.scalars.contains(handle)
            || self.arrays.contains(handle)
            || self.lists.contains(handle)
    }
}

/// Runs a call that makes an object; null, with the thread's message, if it is refused.
fn create(symbol: &'static str, make: impl FnOnce(&mut Machine) -> Result<u64, Refusal>) -> *mut c_void {
    let mut handle = 0;
    call(symbol, Needs::Nothing, |m| {
        handle = make(m)?;
        Ok(())
    });
    handle as *mut c_void
}

/// The values at a pointer, copied.
///
/// # Safety
/// `values` is null, or points to `count` values.
unsafe fn copied<T: Copy>(values: *const T, count: u64) -> Result<Vec<T>, Refusal> {
    match (values.is_null(), count) {
        (_, 0) => Ok(Vec::new()),
        (true, _) => Err(refusal!(ACLNN_ERR_PARAM_NULLPTR, "{count} values at a null pointer")),
        // SAFETY: by the caller's word there are `count` values at the pointer, which is not null.
        (false, _) => Ok(unsafe { slice::from_raw_parts(values, count as usize) }.to_vec()),
    }
}

#[unsafe(no_mangle)]
#[expect(clippy::too_many_arguments, reason = "the C ABI has as many")]
pub unsafe extern "C" fn aclCreateTensor(
    dims: *const i64,
    rank: u64,
    dtype: i32,
    strides: *const i64,
    offset: i64,
    format: i32,
    storage: *const i64,
    storage_rank: u64,
    data: *mut c_void,
) -> *mut c_void {
    create("aclCreateTensor", |m| {
        if rank > MAX_DIMS {
            return Err(refusal!(ACLNN_ERR_PARAM_INVALID, "{rank} dimensions: at most {MAX_DIMS}"));
        }
        // SAFETY: the C ABI has `rank` dimensions at `dims`, as many strides unless null, and `storage_rank` storage dimensions.
        let (dims, storage) = unsafe { (copied(dims, rank)?, copied(storage, storage_rank)?) };
        let strides = match strides.is_null() {
            true => row_major(&dims),
            // SAFETY: as above, and the pointer is not null.
            false => unsafe { copied(strides, rank)? },
        };
        if dtype::bits(dtype).is_none() {
            return Err(refusal!(ACLNN_ERR_PARAM_INVALID, "aclDataType {dtype} is not known here"));
        }
        if dims.iter().chain(&strides).chain(&storage).chain([&offset]).any(|&v| v < 0) {
            return Err(refusal!(
                ACLNN_ERR_PARAM_INVALID,
                "negative sizes: {dims:?}, strides {strides:?}, offset {offset}"
            ));
        }
        let meta = Meta { dims, strides, offset, dtype, format, storage };
        let (_, end) = meta.reach();
        let held: i64 = meta.storage.iter().product();
        if end > held {
            m.violation(format!("aclCreateTensor: a view that reaches element {end} of a storage of {held}: {meta:?}"));
        }
        if data as u64 % TENSOR_ALIGNMENT != 0 {
            m.violation(format!("aclCreateTensor: address {data:?} is not on a boundary of {TENSOR_ALIGNMENT} bytes"));
        }
        Ok(m.objects.tensors.insert(TensorObject { meta, address: data as u64 }))
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclCreateScalar(value: *const c_void, dtype: i32) -> *mut c_void {
    create("aclCreateScalar", |m| {
        let bits = dtype::bits(dtype).filter(|&bits| bits >= 8);
        let Some(bits) = bits else {
            return Err(refusal!(ACLNN_ERR_PARAM_INVALID, "a scalar of aclDataType {dtype}"));
        };
        // SAFETY: the C ABI has one value of the dtype at the pointer, unless it is null, which `copied` refuses.
        let bytes = unsafe { copied(value.cast::<u8>(), bits as u64 / 8)? };
        let (mut wide, mut exact) = ([0.0], [0]);
        dtype::widen(dtype, &bytes, &mut wide);
        dtype::widen_ints(dtype, &bytes, &mut exact);
        let float = match i64::from(dtype) {
            ACL_DOUBLE => f64::from_le_bytes(bytes.as_slice().try_into().expect("a double has eight bytes")),
            _ if dtype::is_float(dtype) => f64::from(wide[0]),
            _ => exact[0] as f64,
        };
        Ok(m.objects.scalars.insert(Scalar { dtype, float, int: exact[0] }))
    })
}

/// The exported pair that makes an array of one type of value.
macro_rules! array {
    ($create:ident, $destroy:ident, $ty:ty, $variant:ident) => {
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $create(values: *const $ty, count: u64) -> *mut c_void {
            create(stringify!($create), |m| {
                // SAFETY: the C ABI has `count` values at the pointer.
                let values = unsafe { copied(values, count)? };
                Ok(m.objects.arrays.insert(Values::$variant(values)))
            })
        }

        #[unsafe(no_mangle)]
        pub extern "C" fn $destroy(array: *const c_void) -> i32 {
            destroy(stringify!($destroy), array, |m, handle| m.objects.arrays.remove(handle).map(drop))
        }
    };
}

array!(aclCreateIntArray, aclDestroyIntArray, i64, Ints);
array!(aclCreateFloatArray, aclDestroyFloatArray, f32, Floats);
array!(aclCreateBoolArray, aclDestroyBoolArray, bool, Bools);

/// The exported pair that makes a list of objects of one kind.
macro_rules! list {
    ($create:ident, $destroy:ident, $table:ident, $kind:expr) => {
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $create(values: *const *const c_void, count: u64) -> *mut c_void {
            create(stringify!($create), |m| {
                // SAFETY: the C ABI has `count` pointers at the pointer.
                let elements: Vec<u64> = unsafe { copied(values, count)? }.into_iter().map(|p| p as u64).collect();
                for &element in &elements {
                    m.objects.$table.get(element)?;
                    if m.objects.owners.contains_key(&element) {
                        m.violation(concat!(stringify!($create), ": an element that is in another list already"));
                    }
                }
                let list = m.objects.lists.insert(List { kind: $kind, elements: elements.clone() });
                m.objects.owners.extend(elements.into_iter().map(|element| (element, list)));
                Ok(list)
            })
        }

        #[unsafe(no_mangle)]
        pub extern "C" fn $destroy(list: *const c_void) -> i32 {
            destroy(stringify!($destroy), list, |m, handle| {
                for element in m.objects.lists.remove(handle)?.elements {
                    m.objects.owners.remove(&element);
                    m.objects.$table.remove(element)?;
                }
                Ok(())
            })
        }
    };
}

list!(aclCreateTensorList, aclDestroyTensorList, tensors, Kind::Tensor);
list!(aclCreateScalarList, aclDestroyScalarList, scalars, Kind::Scalar);

/// Destroys an object; null is nothing to destroy. One that is not live is a violation.
fn destroy(
    symbol: &'static str,
    object: *const c_void,
    remove: impl FnOnce(&mut Machine, u64) -> Result<(), Refusal>,
) -> i32 {
    call(symbol, Needs::Nothing, |m| {
        if object.is_null() {
            return Ok(());
        }
        let handle = object as u64;
        if m.objects.owners.contains_key(&handle) {
            m.violation(format!("{symbol}: the object belongs to a list, which destroys it"));
        }
        remove(m, handle).map_err(|refusal| {
            m.violation(format!("{symbol}: {}", refusal.message));
            refusal!(ACLNN_ERR_INNER_NULLPTR, "{}", refusal.message)
        })
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn aclDestroyTensor(tensor: *const c_void) -> i32 {
    destroy("aclDestroyTensor", tensor, |m, handle| m.objects.tensors.remove(handle).map(drop))
}

#[unsafe(no_mangle)]
pub extern "C" fn aclDestroyScalar(scalar: *const c_void) -> i32 {
    destroy("aclDestroyScalar", scalar, |m, handle| m.objects.scalars.remove(handle).map(drop))
}

#[unsafe(no_mangle)]
pub extern "C" fn aclSetRawTensorAddr(tensor: *mut c_void, address: *mut c_void) -> i32 {
    call("aclSetRawTensorAddr", Needs::Nothing, |m| {
        m.objects.tensors.get_mut(tensor as u64)?.address = address as u64;
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclGetRawTensorAddr(tensor: *const c_void, address: *mut *mut c_void) -> i32 {
    call("aclGetRawTensorAddr", Needs::Nothing, |m| {
        let at = m.objects.tensors.get(tensor as u64)?.address;
        // SAFETY: the C ABI has room for a pointer there.
        unsafe { put(address, at as *mut c_void) }
    })
}

/// Writes a result where the caller asked for it.
///
/// # Safety
/// `out` is null, or points to room for a value.
pub unsafe fn put<T>(out: *mut T, value: T) -> Result<(), Refusal> {
    if out.is_null() {
        return Err(refusal!(ACL_ERROR_RT_PARAM_INVALID, "the result has a null pointer"));
    }
    // SAFETY: by the caller's word there is room, and the pointer is not null.
    unsafe { out.write(value) };
    Ok(())
}
