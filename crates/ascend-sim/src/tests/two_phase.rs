//! Operators, from the caller's side.

use super::harness::*;
use crate::ops::{arithmetic::*, copy::*, matmul::*};

fn add(session: &Session, a: Ptr, b: Ptr, out: Ptr) -> i32 {
    let alpha = scalar(2.0);
    session.run(|size, executor| unsafe { aclnnAddGetWorkspaceSize(a, b, alpha, out, size, executor) }, aclnnAdd)
}

#[test]
fn a_sum_is_there_after_a_synchronise_and_not_before() {
    let s = Session::new();
    let (a, b) = (s.upload_floats(&[1.0, 2.0, 3.0, 4.0]), s.upload_floats(&[10.0, 20.0]));
    let out = s.upload_floats(&[0.0; 4]);
    let code = add(
        &s,
        tensor(a, &[2, 2], ACL_FLOAT),
        view(b, &[2, 2], &[1, 0], 0, &[2], ACL_FLOAT),
        tensor(out, &[2, 2], ACL_FLOAT),
    );
    assert_eq!(code, 0, "{:?}", message());
    assert_eq!(s.floats(out, 4), [0.0; 4]);
    assert_eq!(s.synchronize(), 0, "{:?}", message());
    assert_eq!(s.floats(out, 4), [21.0, 22.0, 43.0, 44.0]);
    assert!(s.violations().is_empty(), "{:?}", s.violations());
}

#[test]
fn a_product_takes_the_transposed_view_of_a_weight() {
    let s = Session::new();
    let (x, w) = (s.upload_floats(&[1.0, 2.0, 3.0]), s.upload_floats(&[1.0, 0.0, 1.0, 0.0, 1.0, 0.0]));
    let out = s.upload_floats(&[0.0; 2]);
    let x = tensor(x, &[1, 3], ACL_FLOAT);
    let w = view(w, &[3, 2], &[1, 3], 0, &[6], ACL_FLOAT);
    let to = tensor(out, &[1, 2], ACL_FLOAT);
    let code = s.run(|size, executor| unsafe { aclnnMmGetWorkspaceSize(x, w, to, 0, size, executor) }, aclnnMm);
    assert_eq!((code, s.synchronize()), (0, 0));
    assert_eq!(s.floats(out, 2), [4.0, 2.0]);
}

#[test]
fn a_cast_rounds_to_nearest_even() {
    let s = Session::new();
    let source = s.upload_floats(&[1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0]);
    let out = s.upload(&[0; 4]);
    let (from, to) = (tensor(source, &[2], ACL_FLOAT), tensor(out, &[2], ACL_BF16));
    let code = s.run(
        |size, executor| unsafe { aclnnCastGetWorkspaceSize(from, ACL_BF16 as i32, to, size, executor) },
        aclnnCast,
    );
    assert_eq!((code, s.synchronize()), (0, 0));
    assert_eq!(s.download(out, 4), [0x80, 0x3f, 0x82, 0x3f]);
}

#[test]
fn a_slice_is_written_and_what_lies_around_it_is_kept() {
    let s = Session::new();
    let (target, source) = (s.upload_floats(&[0.0; 9]), s.upload_floats(&[1.0, 2.0]));
    let to = view(target, &[2, 2], &[3, 1], 4, &[9], ACL_FLOAT);
    let from = tensor(source, &[2], ACL_FLOAT);
    let code =
        s.run(|size, executor| unsafe { aclnnInplaceCopyGetWorkspaceSize(to, from, size, executor) }, aclnnInplaceCopy);
    assert_eq!((code, s.synchronize()), (0, 0));
    assert_eq!(s.floats(target, 9), [0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 0.0, 1.0, 2.0]);
}
