//! Several simulated GPUs that compute one layer.

mod common;

use std::thread;

use baton_device::{
    Backend, DType, DeviceError, Draw, HostLinear, HostTensor, Purpose, TokenId, TokenIds, WeightFormat, conformance,
};
use baton_device_cuda::{CudaBackend, Statistics};
use common::{Simulator, options};

fn ranks(simulator: &Simulator, size: u32, activations: DType) -> Vec<CudaBackend> {
    simulator.control(&format!("devices={size}"));
    CudaBackend::ranks(&options(activations), &(0..size).collect::<Vec<_>>()).unwrap()
}

/// Steps of graphs with sums in them, or between them.
fn put_sums_in_graphs(wanted: bool) {
    // SAFETY: the simulator is one test's at a time, and nothing else of a test reads the environment meanwhile.
    unsafe { std::env::set_var("NCCL_GRAPH_REGISTER", if wanted { "0" } else { "1" }) };
}

#[test]
fn ranks_make_what_one_device_makes_each_the_same_bits() {
    let Some(simulator) = Simulator::new() else { return };
    for (activations, sizes) in [(DType::F32, &[1, 2, 4][..]), (DType::F16, &[4]), (DType::BF16, &[2, 4])] {
        for &size in sizes {
            let backends = ranks(&simulator, size, activations);
            let format = if activations == DType::F16 { WeightFormat::F16 } else { WeightFormat::BF16 };
            let outcome = conformance::ranks(&backends, format).unwrap();
            assert!(outcome.passed(), "{size} in {activations}: {} of {}", outcome.max_error(), outcome.tolerance);
            let bits: Vec<_> = outcome.actual.iter().map(|x| x.to_bits()).collect();
            let each: Vec<_> = bits.chunks_exact(bits.len() / size as usize).collect();
            assert!(each.iter().all(|rank| *rank == each[0]), "{size} in {activations}");
        }
    }
    simulator.expect_clean();
}

/// Some steps of two ranks, of which the second brings nothing to the host: sums of what is there, over and over.
fn steps(backends: &[CudaBackend], count: usize) -> Vec<f32> {
    let step = |rank: usize, x: &mut <CudaBackend as Backend>::Tensor| -> Result<(), DeviceError> {
        let b = &backends[rank];
        b.scale(x, 0.5)?;
        b.all_reduce(x)?;
        b.scale(x, 1.0 + rank as f32 / 4.0)?;
        b.all_reduce(x)?;
        b.scale(x, 1.5)
    };
    let start = |rank: usize| {
        let b = &backends[rank];
        let mut x = b.tensor(2, 8).unwrap();
        let values: Vec<f32> = (0..16).map(|i| (i + rank) as f32 / 8.0).collect();
        b.write(&values, &mut x).unwrap();
        x
    };
    let mut values = Vec::new();
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut x = start(1);
            for _ in 0..count {
                step(1, &mut x).unwrap();
                backends[1].submit().unwrap();
            }
        });
        let mut x = start(0);
        for _ in 0..count {
            step(0, &mut x).unwrap();
            backends[0].read(&x, &mut values).unwrap();
        }
    });
    values
}

#[test]
fn steps_are_replayed_with_sums_in_their_graphs_or_between_them_and_come_to_the_same() {
    let Some(simulator) = Simulator::new() else { return };
    let mut made = Vec::new();
    for inside in [false, true] {
        put_sums_in_graphs(inside);
        let backends = ranks(&simulator, 2, DType::F32);
        made.push(steps(&backends, 6));
        for backend in &backends {
            let Statistics { captures, replays, .. } = backend.statistics();
            // Five commands are worth a graph together, and one by one they are not.
            assert_eq!((captures, replays), if inside { (1, 5) } else { (0, 0) }, "of {}", backend.caps().device);
        }
    }
    put_sums_in_graphs(false);
    assert_eq!(made[0], made[1]);
    assert!(made[0].iter().all(|x| *x != 0.0), "{:?}", made[0]);
    simulator.expect_clean();
}

/// Tokens on the host, and what a rank looked up.
type Choice = (Vec<Option<u32>>, Vec<f32>);

/// What `choose_for_all` gives each rank, and what each looks up of it in a table whose row i is i.
fn shared_choices(backends: &[CudaBackend], rounds: usize) -> Vec<Vec<Choice>> {
    const COLS: usize = 40;
    let choose = |rank: usize| {
        let b = &backends[rank];
        let bytes: Vec<u8> = (0..COLS).flat_map(|i| (i as f32).to_le_bytes()).collect();
        let weight = HostTensor::new("table", DType::F32, vec![COLS, 1], &bytes);
        let (format, purpose) = (WeightFormat::F32, Purpose::Table);
        let table = b.linear_weight(&HostLinear { weight, bias: None, format, purpose }).unwrap();
        let (mut logits, mut out) = (b.tensor(3, COLS).unwrap(), b.tensor(4, 1).unwrap());
        let mut round = |number: usize| {
            let mut values = vec![0.0; 3 * COLS];
            values[number] = 1.0;
            values[COLS + 30 - number] = 1.0;
            values[2 * COLS] = f32::NAN;
            b.write(&values, &mut logits).unwrap();
            let own = if rank == 0 { Some(&logits) } else { None };
            let chosen = b.choose_for_all(own, COLS, &[Draw::LARGEST; 3]).unwrap();
            let ids = [TokenId::Chosen(1), TokenId::Chosen(0), TokenId::Known(39), TokenId::Chosen(1)];
            b.embed(TokenIds::Chosen { tokens: &chosen, ids: &ids }, &table, &mut out).unwrap();
            let (mut tokens, mut looked_up) = (Vec::new(), Vec::new());
            b.read_chosen(&chosen, &mut tokens).unwrap();
            b.read(&out, &mut looked_up).unwrap();
            (tokens, looked_up)
        };
        (0..rounds).map(&mut round).collect()
    };
    thread::scope(|scope| {
        let ranks: Vec<_> = (0..backends.len()).map(|rank| scope.spawn(move || choose(rank))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

#[test]
fn what_the_first_rank_chooses_all_have_on_host_and_device() {
    let Some(simulator) = Simulator::new() else { return };
    const ROUNDS: u32 = 4;
    for inside in [false, true] {
        put_sums_in_graphs(inside);
        for size in [1, 2, 3] {
            let all = shared_choices(&ranks(&simulator, size, DType::F32), ROUNDS as usize);
            let round = |i: u32| {
                let looked_up = [30 - i, i, 39, 30 - i].map(|id| id as f32);
                (vec![Some(i), Some(30 - i), None], looked_up.to_vec())
            };
            let expected: Vec<_> = (0..ROUNDS).map(round).collect();
            all.iter().for_each(|rank| assert_eq!(*rank, expected, "{size} ranks"));
        }
    }
    put_sums_in_graphs(false);
    simulator.expect_clean();
}

#[test]
fn a_rank_that_leaves_ends_the_others_sums_until_all_are_made_anew() {
    let Some(simulator) = Simulator::new() else { return };
    for waits in [false, true] {
        let backends = ranks(&simulator, 2, DType::BF16);
        let mut x = backends[0].tensor(1, 8).unwrap();
        backends[0].write(&[1.0; 8], &mut x).unwrap();
        thread::scope(|scope| {
            let other = scope.spawn(|| {
                if waits {
                    // It may be in its sum by now, or about to come to it: either ends.
                    thread::sleep(std::time::Duration::from_millis(50));
                }
                backends[1].leave();
            });
            if !waits {
                other.join().unwrap();
            }
            let result = backends[0].all_reduce(&mut x).and_then(|()| backends[0].read(&x, &mut Vec::new()));
            assert!(matches!(result, Err(DeviceError::Poisoned { .. })), "{result:?}");
        });
        assert!(backends.iter().all(|backend| matches!(backend.rejoin(), Err(DeviceError::Poisoned { .. }))));
        drop((x, backends));
        let outcome = conformance::ranks(&ranks(&simulator, 2, DType::BF16), WeightFormat::BF16).unwrap();
        assert!(outcome.passed());
    }
}

#[test]
fn a_sum_that_fails_is_the_end_of_all_ranks() {
    let Some(simulator) = Simulator::new() else { return };
    for fault in ["ncclAllReduce:1:6", "ncclAllReduce:2:1", "ncclCommGetAsyncError:1:6"] {
        let backends = ranks(&simulator, 2, DType::F32);
        simulator.control(&format!("fault={fault}"));
        let sum = |backend: &CudaBackend| {
            let mut x = backend.tensor(1, 8)?;
            backend.write(&[1.0; 8], &mut x)?;
            backend.all_reduce(&mut x)?;
            backend.read(&x, &mut Vec::new())
        };
        let results: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = backends.iter().map(|backend| scope.spawn(|| sum(backend))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        simulator.control("fault=");
        // The other may have come to its end before.
        assert!(results.iter().any(Result::is_err), "{fault}");
        let ends = |result: &Result<(), DeviceError>| matches!(result, Ok(()) | Err(DeviceError::Poisoned { .. }));
        assert!(results.iter().all(ends), "{fault}: {results:?}");
        assert!(
            backends.iter().all(|backend| matches!(backend.rejoin(), Err(DeviceError::Poisoned { .. }))),
            "{fault}"
        );
        drop(backends);
        let outcome = conformance::ranks(&ranks(&simulator, 2, DType::F32), WeightFormat::F32).unwrap();
        assert!(outcome.passed(), "{fault}");
    }
}

#[test]
fn devices_that_cannot_be_joined_are_refused_in_words() {
    let Some(simulator) = Simulator::new() else { return };
    simulator.control("devices=2");
    simulator.control("fault=ncclCommInitAll:1:5");
    match CudaBackend::ranks(&options(DType::F32), &[0, 1]).map(|_| ()) {
        Err(DeviceError::Execution { op, reason, .. }) => {
            assert!(op == "ranks" && reason.contains("invalid usage"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(simulator.left(), []);
}
