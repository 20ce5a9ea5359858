//! Writing a step's rows to both planes of a layer's cache in one operator.

use crate::backend::BLOCK;
use crate::device::Device;
use crate::error::AscendError;
use crate::object::View;

/// `planes[i][slots[t]] = rows[i][t]`: rows `[tokens, heads * width_i]`, planes `[slots, heads * width_i]`, slots `[tokens]` i32
/// or i64, distinct; rows and planes of one type of 16 bits.
pub(crate) fn write_cache(
    device: &mut Device,
    rows: [&View; 2],
    planes: [&View; 2],
    heads: usize,
    slots: &View,
) -> Result<(), AscendError> {
    let paged = |plane: &View| {
        let [slots, width] = [plane.dims[0] as usize, plane.dims[1] as usize];
        plane.reshape(&[slots / BLOCK, BLOCK, heads, width / heads])
    };
    let [key, value] = rows.map(|rows| device.tensor(&rows.split(1, heads)));
    let [key_cache, value_cache] = planes.map(|plane| device.tensor(&paged(plane)));
    let (slots, strides, offsets) = (device.tensor(slots), device.ints(&[1, 1]), device.ints(&[0, 0]));
    device.scatter_pa_kv_cache(
        &key,
        &key_cache,
        &slots,
        &value,
        &value_cache,
        None,
        None,
        None,
        None,
        Some(c"None"),
        Some(&strides),
        Some(&offsets),
    )
}
