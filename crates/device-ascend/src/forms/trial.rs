//! Trying a form on the device, and comparing its numbers with those of a judge.

use baton_device::Result as SeamResult;

use super::Verdict;
use crate::abi::codes::Class;
use crate::device::{Device, decode};
use crate::error::AscendError;
use crate::object::{DataType, View};
use crate::owner::Owner;

/// Runs a trial on the device and waits for it. What says that the device cannot do it is a verdict; what says that the
/// device is worthless or full now is an error.
pub(crate) fn try_on<T: Send + 'static>(
    owner: &Owner,
    trial: impl FnOnce(&mut Device) -> Result<T, AscendError> + Send + 'static,
) -> SeamResult<Result<T, String>> {
    owner.call("trial of a form", move |device| match trial(device) {
        Ok(value) => Ok(Ok(value)),
        Err(error) => match error.class() {
            Class::Unsupported | Class::Setup | Class::Failed => Ok(Err(error.to_string())),
            Class::Bug | Class::Memory | Class::Poisoned | Class::Lost => Err(error),
        },
    })
}

/// Whether a form's numbers are the judge's, but for rounding in `dtype`.
pub(crate) fn agree(actual: &[f32], judged: &[f32], dtype: DataType) -> Verdict {
    assert_eq!(actual.len(), judged.len(), "outputs of one shape");
    // Some units in the last place of the largest: a form that means something else is off by far more.
    let bound = match dtype {
        DataType::F32 => 2f32.powi(-10),
        DataType::F16 => 2f32.powi(-7),
        _ => 2f32.powi(-5),
    };
    let largest = judged.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    let differ = |(a, b): (&f32, &f32)| if a.is_finite() && b.is_finite() { (a - b).abs() } else { f32::INFINITY };
    let error = actual.iter().zip(judged).map(differ).fold(0f32, f32::max) / largest.max(f32::MIN_POSITIVE);
    if error <= bound {
        Ok(())
    } else {
        Err(format!("on this device its numbers are off by {error:.2e} of the largest"))
    }
}

/// The numbers of a whole block.
pub(crate) fn floats(device: &mut Device, x: &View) -> Result<Vec<f32>, AscendError> {
    device.with_type(x, DataType::F32, |device, x| {
        let mut values = Vec::new();
        decode(&device.download(x.base, x.numel() * DataType::F32.bytes())?, &mut values);
        Ok(values)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_agree_up_to_the_rounding_of_their_type_and_not_beyond() {
        let judged = [1.0, -2.0, 0.5];
        for (dtype, near) in [(DataType::F32, 1e-3), (DataType::F16, 1e-2), (DataType::BF16, 4e-2)] {
            assert!(agree(&judged.map(|x| x + near), &judged, dtype).is_ok());
            assert!(agree(&judged.map(|x| x + 4.0 * near), &judged, dtype).is_err());
        }
        assert!(agree(&[1.0, f32::NAN, 0.5], &judged, DataType::BF16).is_err());
    }
}
