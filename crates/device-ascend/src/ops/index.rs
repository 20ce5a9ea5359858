//! Rows by number: of the embedding, of activations, and the choice of the largest column. Numbers come from the host and
//! were checked there: the operators do not check them.

use crate::device::{Device, decode};
use crate::error::AscendError;
use crate::object::{DataType, View};

type Result<T> = std::result::Result<T, AscendError>;

/// Runs `work` with the numbers on the device, `[len]` in int32.
pub(crate) fn with_indices<T>(
    device: &mut Device,
    indices: &[i32],
    work: impl FnOnce(&mut Device, &View) -> Result<T>,
) -> Result<T> {
    device.with_views([(DataType::I32, &[indices.len()])], |device, [view]| {
        device.upload(&indices_bytes(indices), view.base)?;
        work(device, &view)
    })
}

/// As the device has them.
pub(crate) fn indices_bytes(indices: &[i32]) -> Vec<u8> {
    indices.iter().flat_map(|i| i.to_le_bytes()).collect()
}

/// `out[t] = table[ids[t]]`, in the table's type.
pub(crate) fn embed(device: &mut Device, ids: &[i32], table: &View, out: &View) -> Result<()> {
    with_indices(device, ids, |device, ids| {
        let (table, ids, out) = (device.tensor(table), device.tensor(ids), device.tensor(out));
        device.embedding(&table, &ids, &out)
    })
}

/// The rows as a range, if they follow each other.
fn consecutive(rows: &[i32]) -> Option<usize> {
    rows.windows(2).all(|pair| pair[1] == pair[0] + 1).then(|| rows[0] as usize)
}

/// `out[i] = x[rows[i]]`, of one type.
pub(crate) fn gather(device: &mut Device, x: &View, rows: &[i32], out: &View) -> Result<()> {
    if let Some(first) = consecutive(rows) {
        return device.assign(out, &x.narrow(0, first, rows.len()));
    }
    with_indices(device, rows, |device, rows| select(device, x, rows, out))
}

/// `out[i] = x[rows[i]]` for numbers on the device.
pub(crate) fn select(device: &mut Device, x: &View, rows: &View, out: &View) -> Result<()> {
    let (x, rows, out) = (device.tensor(x), device.tensor(rows), device.tensor(out));
    device.index_select(&x, 0, &rows, &out)
}

/// `out[rows[i]] += x[i]`; rows are distinct.
pub(crate) fn add_rows(device: &mut Device, x: &View, rows: &[i32], out: &View) -> Result<()> {
    if let Some(first) = consecutive(rows) {
        return super::rows::add(device, &out.narrow(0, first, rows.len()), x);
    }
    with_indices(device, rows, |device, rows| {
        device.with_views([(out.dtype, &[rows.numel(), out.dims[1] as usize])], |device, [sum]| {
            select(device, out, rows, &sum)?;
            super::rows::add(device, &sum, x)?;
            let (out, rows, sum) = (device.tensor(out), device.tensor(rows), device.tensor(&sum));
            device.index_copy_in_place(&out, 0, &rows, &sum)
        })
    })
}

/// The column of the largest number of each row; `None` for one that is not finite throughout: its product with zeros is not
/// zero. Which of equals it is is the operator's choice, UNCONFIRMED to be the first.
pub(crate) fn argmax(device: &mut Device, x: &View) -> Result<Vec<Option<u32>>> {
    let (rows, cols) = (x.dims[0] as usize, x.dims[1] as usize);
    let zeros = View::new(device.zeros(cols * x.dtype.bytes())?, x.dtype, &[cols, 1]);
    let shapes: [(DataType, &[usize]); 2] = [(DataType::I32, &[2, rows]), (x.dtype, &[rows, 1])];
    device.with_views(shapes, |device, [answer, products]| {
        let largest = answer.narrow(0, 0, 1).reshape(&[rows]);
        // The second row holds floats of the same width, so that one copy brings both.
        let sums = View { dtype: DataType::F32, ..answer.narrow(0, 1, 1).reshape(&[rows, 1]) };
        let (x, zeros, math) = (device.tensor(x), device.tensor(&zeros), device.cube_math());
        let (largest, columns) = (device.tensor(&largest), device.tensor(&products));
        device.arg_max(&x, 1, false, &largest)?;
        device.mm(&x, &zeros, &columns, math)?;
        device.assign(&sums, &products)?;
        let bytes = device.download(answer.base, answer.numel() * 4)?;
        let (columns, sums) = bytes.split_at(rows * 4);
        let mut values = Vec::new();
        decode(sums, &mut values);
        let columns = columns.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b));
        Ok(columns.zip(values).map(|(column, sum)| (sum == 0.0).then_some(column)).collect())
    })
}
