//! Several intermediate results in one block of scratch memory.

use crate::device::Device;
use crate::error::AscendError;
use crate::object::{Address, DataType, View};

/// Parts start at multiples of this, and at least 32 bytes lie between two: what operators ask of addresses.
const GRAIN: usize = 512;

/// Hands out windows on a block from its front.
pub(crate) struct Carver {
    at: usize,
}

impl Carver {
    /// The next window, row-major.
    pub(crate) fn view(&mut self, dtype: DataType, dims: &[usize]) -> View {
        let view = View::new(Address(self.at), dtype, dims);
        self.at += (view.numel() * dtype.bytes() + 32).next_multiple_of(GRAIN);
        view
    }
}

impl Device {
    /// Runs `work` with what `lay_out` carves out of scratch memory. It is called twice: to measure, and on the block.
    pub(crate) fn with_parts<P, T>(
        &mut self,
        lay_out: impl Fn(&mut Carver) -> P,
        work: impl FnOnce(&mut Self, &P) -> Result<T, AscendError>,
    ) -> Result<T, AscendError> {
        let mut measure = Carver { at: 0 };
        lay_out(&mut measure);
        self.with_scratch(measure.at, |device, block| work(device, &lay_out(&mut Carver { at: block.0 })))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_neither_touch_nor_lie_on_odd_addresses() {
        let mut carver = Carver { at: 4096 };
        let views: Vec<_> = [1, 120, 128, 1000].map(|n| carver.view(DataType::F32, &[n])).into();
        for pair in views.windows(2) {
            let end = pair[0].base.0 + pair[0].numel() * 4;
            assert!(pair[1].base.0.is_multiple_of(GRAIN) && pair[1].base.0 >= end + 32, "{pair:?}");
        }
    }
}
