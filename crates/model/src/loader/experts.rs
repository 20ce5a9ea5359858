//! The experts of a layer, one after the other: those that this rank holds, and on the first rank, which sees every tensor,
//! then the others' for digest and checks.

use baton_device::{Backend, DeviceError, ExpertSource, HostExperts, HostTensor, MoeOps, Routing, WeightFormat};

use super::{Loader, Mapped};
use crate::LoadError;
use crate::checkpoint::CheckpointError;

impl<B: MoeOps> Loader<'_, B> {
    /// `{prefix}.{expert}.{name}.weight` of this rank's share of a layer's experts, for the names of gate, up and down, whose
    /// products are bounded by `limit` if there is one.
    pub(crate) fn experts(
        &mut self,
        prefix: &str,
        [gate, up, down]: [&str; 3],
        count: usize,
        routing: Routing,
        limit: Option<f32>,
    ) -> Result<B::Experts, LoadError> {
        let names = [gate, up, down];
        // Those of the others are the same.
        let formats = names.map(|name| self.formats[&format!("{prefix}.0.{name}.weight")]);
        let (backend, held) = (self.backend, self.world.share(count));
        let others = if self.sees_all() { held.end..count } else { 0..0 };
        let mut source = LayerExperts { loader: self, prefix, names, formats, current: None };
        let experts =
            backend.expert_weights(HostExperts { count, held, source: &mut source, formats, limit, routing })?;
        for expert in others {
            source.read(expert)?;
        }
        source.release()?;
        Ok(experts)
    }
}

/// The experts of a layer on their way to a device.
struct LayerExperts<'l, 'a, B: Backend> {
    loader: &'l mut Loader<'a, B>,
    prefix: &'l str,
    names: [&'l str; 3],
    formats: [WeightFormat; 3],
    /// The one in hand.
    current: Option<[Mapped<'a>; 3]>,
}

impl<B: Backend> LayerExperts<'_, '_, B> {
    /// Unmaps the expert in hand.
    fn release(&mut self) -> Result<(), CheckpointError> {
        self.current.take().into_iter().flatten().try_for_each(|matrix| self.loader.record(matrix))
    }

    fn read(&mut self, expert: usize) -> Result<[HostTensor<'_>; 3], CheckpointError> {
        self.release()?;
        let mut read = |i: usize| {
            let name = format!("{}.{expert}.{}.weight", self.prefix, self.names[i]);
            let matrix = self.loader.map(&name)?;
            Ok::<_, CheckpointError>(self.loader.convert(matrix, self.formats[i]))
        };
        let read = [read(0)?, read(1)?, read(2)?];
        Ok(self.current.insert(read).each_ref().map(Mapped::host))
    }
}

impl<B: Backend> ExpertSource for LayerExperts<'_, '_, B> {
    fn expert(&mut self, expert: usize) -> baton_device::Result<[HostTensor<'_>; 3]> {
        self.read(expert).map_err(|error| DeviceError::Source(error.into()))
    }
}
