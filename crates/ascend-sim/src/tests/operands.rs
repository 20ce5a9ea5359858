//! Tensors, scalars, arrays, lists.

use std::ptr::null_mut;

use super::harness::*;

#[test]
pub fn a_tensor_off_its_boundary_is_a_violation() {
    let s = Session::new();
    let address = s.upload(&[0; 128]);
    tensor(address.wrapping_byte_add(32), &[2], ACL_FLOAT);
    assert!(s.violations().is_empty());
    tensor(address.wrapping_byte_add(16), &[2], ACL_FLOAT);
    s.assert_violation("boundary of 32 bytes");
}

#[test]
fn a_view_beyond_its_storage_is_a_violation() {
    let s = Session::new();
    let address = s.upload(&[0; 64]);
    view(address, &[2, 3], &[8, 1], 1, &[12], ACL_FLOAT);
    assert!(s.violations().is_empty());
    view(address, &[2, 3], &[8, 1], 2, &[12], ACL_FLOAT);
    s.assert_violation("reaches element 13 of a storage of 12");
}

#[test]
pub fn an_element_destroyed_beside_its_list_is_a_violation() {
    let s = Session::new();
    let list = || {
        let elements = [0; 2].map(|_| tensor(s.upload(&[0; 8]), &[2], ACL_FLOAT));
        (elements, unsafe { aclCreateTensorList(elements.as_ptr().cast(), 2) })
    };
    let (elements, owner) = list();
    assert_eq!(aclDestroyTensorList(owner), 0);
    assert!(s.violations().is_empty());
    assert_eq!(i64::from(aclDestroyTensor(elements[0])), ACLNN_ERR_INNER_NULLPTR, "the list destroyed it");
    s.assert_violation("destroyed before");
    lock().counters = Default::default();

    let (elements, owner) = list();
    assert_eq!(aclDestroyTensor(elements[0]), 0);
    s.assert_violation("belongs to a list");
    assert_ne!(aclDestroyTensorList(owner), 0);
}

#[test]
fn a_scalar_has_the_value_of_its_dtype() {
    let _s = Session::new();
    let value = |bytes: &[u8], dtype: i64| {
        let scalar = unsafe { aclCreateScalar(bytes.as_ptr().cast(), dtype as i32) };
        let value = lock().objects.scalars.get(scalar as u64).map(|s| (s.to_f64(), s.to_i64()));
        value.unwrap()
    };
    assert_eq!(value(&1.5_f32.to_le_bytes(), ACL_FLOAT), (1.5, 1));
    assert_eq!(value(&0x3fc0_u16.to_le_bytes(), ACL_BF16), (1.5, 1));
    assert_eq!(value(&0.1_f64.to_le_bytes(), ACL_DOUBLE), (0.1, 0));
    assert_eq!(value(&(-3_i64).to_le_bytes(), ACL_INT64), (-3.0, -3));
    assert_eq!(value(&[1], ACL_BOOL), (1.0, 1));
    assert!(unsafe { aclCreateScalar([0_u8; 8].as_ptr().cast(), ACL_INT4 as i32) }.is_null());
    assert!(unsafe { aclCreateScalar(null_mut(), ACL_FLOAT as i32) }.is_null());
}

#[test]
fn null_is_nothing_to_destroy() {
    let s = Session::new();
    let destroys = [aclDestroyTensor, aclDestroyScalar, aclDestroyIntArray, aclDestroyTensorList, aclDestroyScalarList];
    destroys.iter().for_each(|destroy| assert_eq!(destroy(null_mut()), 0));
    assert!(s.violations().is_empty());
}
