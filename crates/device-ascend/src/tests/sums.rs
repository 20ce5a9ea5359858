//! Sums over ranks.

use std::sync::Arc;
use std::time::Duration;

use baton_device::DeviceError;

use super::{floats, open_device, values};
use crate::object::DataType;
use crate::owner::Owner;
use crate::ranks::{self, Place};
use crate::simulator::Simulator;

/// Devices that are joined.
fn joined(simulator: &Simulator, size: usize, timeout: Duration) -> (Vec<Arc<Owner>>, Vec<Place>) {
    simulator.control(&format!("devices={size}"));
    let owners: Vec<_> = (0..size).map(|id| open_device(id as i32, timeout).expect("a device")).collect();
    let places = ranks::join(&owners).expect("they join");
    assert_eq!(places.iter().map(|place| (place.world.rank, place.world.size)).collect::<Vec<_>>(), {
        (0..size).map(|rank| (rank, size)).collect::<Vec<_>>()
    });
    (owners, places)
}

/// A sum of `len` numbers on each rank, which it gives `times` times; the results.
fn sum(owner: &Owner, rank: usize, len: usize, dtype: DataType, times: usize) -> baton_device::Result<Vec<f32>> {
    let numbers: Vec<f32> = (0..len).map(|i| (rank + 1) as f32 * (i % 7) as f32).collect();
    let x = owner.call("write", move |device| floats(device, &numbers, dtype))?;
    for _ in 0..times {
        let x = x.clone();
        owner.submit("sum", move |device| device.all_reduce(&x))?;
    }
    owner.call("read", move |device| device.with_type(&x, DataType::F32, |device, wide| values(device, wide)))
}

/// The same on a thread for each rank.
fn on_all<T: Send>(owners: &[Arc<Owner>], work: impl Fn(usize, &Owner) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> =
            owners.iter().enumerate().map(|(rank, owner)| scope.spawn(move || work(rank, owner))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}

#[test]
fn every_rank_gets_the_sum_in_every_type() {
    let simulator = Simulator::new();
    for size in [2, 4] {
        let (owners, _places) = joined(&simulator, size, Duration::from_secs(60));
        for dtype in [DataType::F32, DataType::F16, DataType::BF16] {
            for len in [1, 33, 4096] {
                let results = on_all(&owners, |rank, owner| sum(owner, rank, len, dtype, 2));
                // Once summed all are equal, so the second sum is `size` times as much.
                let ranks = size * (size + 1) / 2;
                let expected: Vec<f32> = (0..len).map(|i| (ranks * size * (i % 7)) as f32).collect();
                for result in results {
                    assert_eq!(result.expect("a sum"), expected, "{len} of {dtype:?} over {size}");
                }
            }
        }
        drop(owners);
        simulator.expect_clean();
    }
}

#[test]
fn ranks_that_disagree_all_end_with_an_error() {
    let simulator = Simulator::new();
    let (owners, _places) = joined(&simulator, 2, Duration::from_secs(60));
    let results = on_all(&owners, |rank, owner| sum(owner, rank, 8 + rank, DataType::F32, 1));
    assert!(results.iter().all(Result::is_err), "{results:?}");
    drop(owners);
}

#[test]
fn a_rank_that_does_not_come_loses_the_others_within_the_timeout() {
    let simulator = Simulator::new();
    let (owners, places) = joined(&simulator, 2, Duration::from_millis(300));
    let alone = sum(&owners[0], 0, 8, DataType::F32, 1);
    assert!(matches!(alone, Err(DeviceError::Lost { .. })), "{alone:?}");
    places.iter().for_each(|place| place.all_here("ascend:0").expect("nobody left"));
    places[1].leave();
    places.iter().for_each(|place| {
        assert!(matches!(place.all_here("ascend:0"), Err(DeviceError::Poisoned { .. })));
    });
    drop(owners);
}

#[test]
fn a_rank_that_cannot_join_fails_the_whole() {
    let simulator = Simulator::new();
    simulator.control("devices=2");
    simulator.control("collective_timeout=200");
    let owners: Vec<_> = (0..2).map(|id| open_device(id, Duration::from_secs(5)).expect("a device")).collect();
    simulator.control("fault=HcclCommInitRootInfo:1:4");
    let failed = ranks::join(&owners).err().expect("one could not join");
    assert!(failed.to_string().contains("HcclCommInitRootInfo"), "{failed}");
    simulator.calm();
    drop(owners);
    simulator.expect_clean();
}
