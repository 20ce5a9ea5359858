//! Weights brought into the form that matrix units read: blocks (FRACTAL_NZ), and packed four-bit integers.

use super::view::{dense, store, store_ints};
use crate::{
    array::{Chip, Fault, Refusal},
    constants::*,
    dtype,
    limits::{check, valid},
    machine::{Needs, call},
    math::{
        nz::{block_cols, block_dims, to_blocks},
        quant::pack_int4,
    },
    meta::put,
    op::{Arg, Binder, Kernel, Out, Ref, Tensor, operator},
    runtime::Runtime,
};

/// Elements of a matrix in blocks.
fn blocked_len(rows: i64, cols: i64, dtype: i32) -> i64 {
    let c = block_cols(dtype::bytes(dtype, 1) as usize);
    block_dims(rows as usize, cols as usize, c).iter().product::<usize>() as i64
}

operator! {
    /// A matrix brought into blocks where it lies. Its storage has room for whole blocks.
    TransMatmulWeight = aclnnTransMatmulWeight, aclnnTransMatmulWeightGetWorkspaceSize (weight: Ref)
}

impl Kernel for TransMatmulWeight {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        check(chip, "TransMatmulWeight", &[&self.weight])?;
        let dims = &self.weight.dims;
        valid(dims.len() == 2 && !dims.contains(&1), || format!("{dims:?} is no matrix of several rows and columns"))?;
        let (held, want) =
            (self.weight.storage.iter().product::<i64>(), blocked_len(dims[0], dims[1], self.weight.dtype));
        valid(held >= want, || format!("storage of {held} elements, fewer than the {want} of whole blocks"))
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        let weight = &*self.weight;
        let (rows, cols) = (weight.dims[0] as usize, weight.dims[1] as usize);
        let c = block_cols(dtype::bytes(weight.dtype, 1) as usize);
        let matrix = rt.load(weight)?;
        let room = dense(weight, &[blocked_len(weight.dims[0], weight.dims[1], weight.dtype)]);
        store(rt, &room, to_blocks(&matrix.data, rows, cols, c))
    }
}

/// The elements, not bytes, of a matrix in blocks. A call of one phase.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aclnnCalculateMatmulWeightSizeV2(
    shape: *const std::ffi::c_void,
    dtype: i32,
    size: *mut u64,
) -> i32 {
    call("aclnnCalculateMatmulWeightSizeV2", Needs::Init, |m| {
        // SAFETY: the shape is a handle, which is looked up and not followed.
        let dims = unsafe { Vec::<i64>::bind(shape, "tensorShape", &mut Binder::new(&m.objects))? };
        let narrow = [ACL_FLOAT16, ACL_BF16, ACL_INT8].contains(&i64::from(dtype));
        valid(narrow, || format!("aclDataType {dtype}: f16, bf16 or int8"))?;
        valid(dims.len() == 2 && dims.iter().all(|&d| d > 0), || format!("{dims:?} is no matrix"))?;
        // SAFETY: the C ABI gives room for the result.
        unsafe { put(size, blocked_len(dims[0], dims[1], dtype) as u64) }
    })
}

operator! {
    /// Four-bit integers, one in each 32 bits, packed: eight to 32 bits, or as a tensor of INT4.
    ConvertWeightToINT4Pack = aclnnConvertWeightToINT4Pack, aclnnConvertWeightToINT4PackGetWorkspaceSize
        (weight: Tensor, packed: Out)
}

impl Kernel for ConvertWeightToINT4Pack {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        check(chip, "ConvertWeightToINT4Pack", &[&self.weight, &self.packed])?;
        let mut want = self.weight.dims.clone();
        let per = if i64::from(self.packed.dtype) == ACL_INT4 { 1 } else { 8 };
        let inner = want.last_mut();
        valid(inner.as_ref().is_some_and(|inner| **inner % 8 == 0), || {
            "the last dimension is a multiple of 8".to_owned()
        })?;
        inner.into_iter().for_each(|inner| *inner /= per);
        super::view::shaped("weightInt4Pack", &self.packed, &want)
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        let values = rt.load_ints(&self.weight)?.data;
        if let Some(bad) = values.iter().find(|v| !(-8..8).contains(*v)) {
            return Err(Fault::Violation(format!("{bad} does not fit four bits")));
        }
        match i64::from(self.packed.dtype) {
            ACL_INT4 => store_ints(rt, &self.packed, values),
            _ => store_ints(rt, &self.packed, pack_int4(&values)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::array::Meta;
    use crate::math::quant::unpack_int4;
    use crate::ops::bench::{Bench, F16, F32, I32, inplace, near, numbers, turned};
    use crate::ops::matmul::{MatmulWeightNz, Mm};

    /// A weight `[n, k]` in whole blocks of storage.
    fn weight(b: &Bench, data: &[f32], n: i64, k: i64) -> Tensor {
        let room = b.empty(&[blocked_len(n, k, F16 as i32)], F16);
        let ordinary = room.view(vec![n, k], vec![k, 1], 0);
        b.fill(&ordinary, data);
        ordinary
    }

    /// The same memory as the turned weight `[k, n]` in blocks.
    fn blocked(weight: &Tensor) -> Tensor {
        let storage = block_dims(weight.dims[0] as usize, weight.dims[1] as usize, 16).map(|d| d as i64).to_vec();
        let view = turned(weight);
        Tensor { meta: Meta { storage, format: ACL_FORMAT_FRACTAL_NZ as i32, ..view.meta.clone() }, ..view }
    }

    #[test]
    fn a_weight_in_blocks_gives_the_same_product_and_garbage_when_passed_as_an_ordinary_one() {
        let b = Bench::new(Chip::A2);
        let (n, k) = (24, 40);
        let (x, data) = (b.floats(&[3, k], F16, &numbers(3 * 40, 1)), numbers(24 * 40, 2));
        let w = weight(&b, &data, n, k);
        let [before, after, garbage] = [0; 3].map(|_| b.out(&[3, n], F16));
        b.run(&Mm { this: x.clone(), mat2: turned(&w), out: before.clone(), cube_math_type: 0 }).unwrap();
        b.run(&TransMatmulWeight { weight: inplace(&w) }).unwrap();
        let nz = blocked(&w);
        b.run(&MatmulWeightNz { this: x.clone(), mat2: nz.clone(), out: after.clone(), cube_math_type: 0 }).unwrap();
        assert_eq!(b.read(&after), b.read(&before));
        b.run(&Mm { this: x.clone(), mat2: nz.clone(), out: after.clone(), cube_math_type: 0 }).unwrap();
        assert_eq!(b.read(&after), b.read(&before));
        b.run(&Mm { this: x.clone(), mat2: turned(&w), out: garbage.clone(), cube_math_type: 0 }).unwrap();
        let (garbage_read, before) = (b.read(&garbage), b.read(&before));
        assert!(!near(&garbage_read, &before, 0.01));
        let ordinary = MatmulWeightNz { this: x.clone(), mat2: turned(&w), out: garbage.clone(), cube_math_type: 0 };
        assert_eq!(b.check(&ordinary), 161_002);
        let wrong = Tensor { meta: Meta { storage: vec![24, 40], ..nz.meta.clone() }, ..nz };
        assert_eq!(b.check(&Mm { this: x, mat2: wrong, out: garbage, cube_math_type: 0 }), 161_002);
    }

    #[test]
    fn a_weight_needs_room_for_whole_blocks_and_several_rows_and_columns() {
        let b = Bench::new(Chip::A2);
        for (dims, storage, want) in [
            ([24, 40], 32 * 48, 0),
            ([24, 40], 32 * 48 - 1, 161_002),
            ([24, 1], 32 * 16, 161_002),
            ([1, 24], 16 * 32, 161_002),
        ] {
            let room = b.empty(&[storage], F16);
            let w = room.view(dims.to_vec(), vec![dims[1], 1], 0);
            assert_eq!(b.check(&TransMatmulWeight { weight: inplace(&w) }), want, "{dims:?} {storage}");
        }
        let wide = b.empty(&[16, 16], F32);
        assert_eq!(b.check(&TransMatmulWeight { weight: inplace(&wide) }), 161_002);
        assert_eq!(blocked_len(24, 40, F16 as i32), 32 * 48);
        assert_eq!(blocked_len(24, 40, ACL_INT8 as i32), 32 * 64);
    }

    #[test]
    fn four_bit_integers_are_packed_in_both_forms() {
        let b = Bench::new(Chip::A2);
        let values: Vec<i64> = (0..16).map(|i| i - 8).collect();
        let w = b.ints(&[2, 8], I32, &values);
        let (words, nibbles) = (b.out(&[2, 1], I32), b.out(&[2, 8], ACL_INT4));
        b.run(&ConvertWeightToINT4Pack { weight: w.clone(), packed: words.clone() }).unwrap();
        assert_eq!(unpack_int4(&b.read_ints(&words)), values);
        b.run(&ConvertWeightToINT4Pack { weight: w.clone(), packed: nibbles.clone() }).unwrap();
        assert_eq!(b.read_ints(&nibbles), values);
        let (odd, out) = (b.empty(&[2, 12], I32), b.out(&[2, 1], I32));
        assert_eq!(b.check(&ConvertWeightToINT4Pack { weight: odd, packed: out }), 161_002);
        let large = b.ints(&[1, 8], I32, &[8; 8]);
        let out = b.out(&[1, 1], I32);
        assert!(matches!(b.run(&ConvertWeightToINT4Pack { weight: large, packed: out }), Err(Fault::Violation(_))));
    }
}
