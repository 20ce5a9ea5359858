//! Orders in which weights have the columns of their input, where that is not the input's own (`coded.rs` says when).
//!
//! Invariant: there is one for all weights that are there and have it, so who has one in common can share rows in it.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use baton_device::Result;

use crate::gpu::Gpu;
use crate::memory::Buffer;

/// An order of columns.
pub(crate) struct Order {
    /// Which it is, counted as they were made.
    pub(crate) number: usize,
    columns: Vec<i32>,
    buffer: Buffer,
}

impl Order {
    /// Where it is on the device: for each of the weight's columns which of the input's it is, negative for none.
    pub(crate) fn address(&self) -> u64 {
        self.buffer.address()
    }
}

/// Those of the weights that are there.
#[derive(Default)]
pub(crate) struct Orders(Mutex<Known>);

#[derive(Default)]
struct Known {
    orders: Vec<Weak<Order>>,
    made: usize,
}

impl Orders {
    /// The one of these columns.
    ///
    /// # Errors
    /// If memory is short.
    pub(crate) fn get(&self, gpu: &Arc<Gpu>, columns: Vec<i32>) -> Result<Arc<Order>> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.orders.retain(|order| order.strong_count() > 0);
        if let Some(order) = known.orders.iter().filter_map(Weak::upgrade).find(|order| order.columns == columns) {
            return Ok(order);
        }
        let bytes: Vec<u8> = columns.iter().flat_map(|column| column.to_ne_bytes()).collect();
        let order = Arc::new(Order { number: known.made, columns, buffer: gpu.load(&bytes, "an order of columns")? });
        known.made += 1;
        known.orders.push(Arc::downgrade(&order));
        Ok(order)
    }
}
