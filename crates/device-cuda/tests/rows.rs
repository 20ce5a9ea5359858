//! Operations on rows beyond the shared cases: the greedy choice, f32 beside activations, sizes that take other ways, steps
//! that come again.

mod common;

use baton_device::conformance::{self, Case, uniform};
use baton_device::{
    Activation, Backend, DType, Draw, HostLinear, HostTensor, Purpose, Reference, Result, Rows, TokenIds, WeightFormat,
};
use baton_device_cuda::{CudaBackend, CudaOptions};
use common::{Simulator, options};

/// The greedy choice of each row.
fn largest(b: &CudaBackend, logits: &<CudaBackend as Backend>::Tensor) -> Vec<Option<u32>> {
    let mut chosen = vec![Some(7); 3];
    b.read_chosen(&b.choose(logits, &vec![Draw::LARGEST; logits.rows()]).unwrap(), &mut chosen).unwrap();
    chosen
}

#[test]
fn the_first_of_equals_is_chosen_and_a_row_that_is_not_finite_has_none() {
    let Some(simulator) = Simulator::new() else { return };
    for activations in [DType::F32, DType::F16, DType::BF16] {
        let backend = simulator.open(activations);
        for cols in [1, 7, 64, 1000, 9001, 16400, 40968] {
            let mut rows: Vec<Vec<f32>> = (0..6).map(|_| (0..cols).map(|i| (i % 7) as f32 - 9.0).collect()).collect();
            rows[1][cols - 1] = 9.0;
            rows[2][cols / 2] = f32::NAN;
            rows[3][cols - 1] = f32::INFINITY;
            rows[4][0] = f32::NEG_INFINITY;
            rows[5].fill(-3.0);
            let mut x = backend.tensor(rows.len(), cols).unwrap();
            backend.write(&rows.concat(), &mut x).unwrap();
            let chosen = largest(&backend, &x);
            let last = cols as u32 - 1;
            assert_eq!(chosen, [Some(last.min(6)), Some(last), None, None, None, Some(0)], "{cols} in {activations}");
        }
        assert_eq!(largest(&backend, &backend.tensor(4, 3).unwrap()), []);
    }
}

#[test]
fn norms_and_functions_of_long_rows_give_the_judges_numbers() {
    let Some(simulator) = Simulator::new() else { return };
    simulator.control("order=reverse");
    for activations in [DType::F32, DType::BF16] {
        // Whatever a kernel touches beyond a buffer is a fault.
        let backend = CudaBackend::new(&CudaOptions { isolated: true, ..options(activations) }).unwrap();
        let norms = [(1, 1024, 1024), (2, 5000, 5000), (3, 2050, 1025), (5, 2048, 128), (2, 4104, 4104)];
        let norms = norms.map(|(rows, cols, run)| Case::Norm { rows, cols, run });
        let elementwise = [(3, 2049), (2, 4096)].map(|(rows, cols)| Case::Elementwise { rows, cols });
        for case in norms.iter().chain(&elementwise) {
            let outcome = conformance::run(case, &backend).unwrap();
            assert!(outcome.passed(), "{case:?}: {} over {}", outcome.max_error(), outcome.tolerance);
        }
    }
    simulator.expect_clean();
}

/// Everything that takes rows, with a tensor in f32 (where a weight in f32 gives one) in each place.
fn beside_f32<B: Backend>(b: &B) -> Result<Vec<f32>> {
    const COLS: usize = 40;
    let rows = 3;
    let values = |seed| uniform(seed, rows * COLS, 1.0).iter().map(|v| (v * 64.0).round() / 64.0).collect::<Vec<f32>>();
    let one: Vec<u8> = (0..COLS * COLS).flat_map(|i| f32::from(u8::from(i % (COLS + 1) == 0)).to_le_bytes()).collect();
    let identity = HostTensor::new("one", DType::F32, vec![COLS, COLS], &one);
    let identity = b.linear_weight(&HostLinear {
        weight: identity,
        bias: None,
        format: WeightFormat::F32,
        purpose: Purpose::Product,
    })?;
    let norm: Vec<u8> = uniform(5, COLS, 1.0).iter().flat_map(|v| v.to_le_bytes()).collect();
    let norm = b.vector(&HostTensor::new("norm", DType::F32, vec![COLS], &norm))?;
    let tensor = |seed: u64, wide: bool| {
        let mut x = b.tensor(rows, COLS)?;
        b.write(&values(seed), &mut x)?;
        if !wide {
            return Ok(x);
        }
        let mut out = b.tensor(rows, COLS)?;
        b.linear(&x, &identity, &mut out)?;
        Ok(out)
    };
    let (mut all, mut one) = (Vec::new(), Vec::new());
    let mut keep = |x: &B::Tensor| -> Result<()> {
        b.read(x, &mut one)?;
        all.extend_from_slice(&one);
        Ok(())
    };
    for (first, second) in [(false, true), (true, false), (true, true)] {
        let (mut x, mut y) = (tensor(1, first)?, tensor(2, second)?);
        let mut out = b.tensor(rows, COLS)?;
        b.rms_norm(&x, &norm, 1e-6, &mut out)?;
        keep(&out)?;
        b.add_rms_norm(&x, &mut y, &norm, 1e-6, &mut out)?;
        keep(&out)?;
        keep(&y)?;
        b.gated_activation(Activation::Silu, &x, &y, &mut out)?;
        keep(&out)?;
        b.add(&mut y, &x)?;
        b.scale(&mut y, 0.25)?;
        b.softcap(&mut y, 2.0)?;
        b.rms_norm_in_place(&mut x, &norm, 1e-6)?;
        let mut picked = b.tensor(2, COLS)?;
        b.gather_rows(&x, &[2, 0], &mut picked)?;
        b.add_rows(&picked, &[1, 2], &mut y)?;
        keep(&x)?;
        keep(&y)?;
        keep(&picked)?;
    }
    Ok(all)
}

#[test]
fn every_operation_takes_f32_beside_activations() {
    let Some(simulator) = Simulator::new() else { return };
    let judges = beside_f32(&Reference::new()).unwrap();
    for (activations, tolerance) in [(DType::F32, 2e-5), (DType::F16, 6e-3), (DType::BF16, 5e-2)] {
        let ours = beside_f32(&simulator.open(activations)).unwrap();
        assert_eq!(ours.len(), judges.len());
        for (i, (a, b)) in ours.iter().zip(&judges).enumerate() {
            assert!((a - b).abs() < tolerance, "number {i} in {activations}: {a} for {b}");
        }
    }
    simulator.expect_clean();
}

#[test]
fn a_step_that_comes_again_is_replayed_and_asks_for_no_memory() {
    let Some(simulator) = Simulator::new() else { return };
    let backend = simulator.open(DType::BF16);
    let format = WeightFormat::BF16;
    let bytes = vec![0x3c; 2 * 64 * 64];
    let weight = HostTensor::new("w", DType::BF16, vec![64, 64], &bytes);
    let weight = backend.linear_weight(&HostLinear { weight, bias: None, format, purpose: Purpose::Product }).unwrap();
    let norm = vec![0; 4 * 64];
    let norm = backend.vector(&HostTensor::new("norm", DType::F32, vec![64], &norm)).unwrap();
    let mut tensors: Vec<_> = (0..3).map(|_| backend.tensor(70, 64).unwrap()).collect();
    let [x, y, z] = tensors.get_disjoint_mut([0, 1, 2]).unwrap();
    let mut step = |rows: usize, first: u32| {
        let ids: Vec<u32> = (0..rows as u32).map(|i| (first + i) % 64).collect();
        backend.embed(TokenIds::Known(&ids), &weight, x).unwrap();
        backend.rms_norm(x, &norm, 1e-6, y).unwrap();
        backend.linear(y, &weight, z).unwrap();
        backend.add(x, z).unwrap();
        backend.gather_rows(x, &[rows as u32 - 1, 0], y).unwrap();
        largest(&backend, y);
        backend.statistics()
    };
    for rows in [1, 12, 70] {
        step(rows, 0);
        let before = step(rows, 1);
        let after = [2, 3, 4].map(|first| step(rows, first))[2];
        assert_eq!(after.replays - before.replays, 3, "{rows} rows");
        assert_eq!((after.captures, after.lists), (before.captures, before.lists), "{rows} rows");
        assert_eq!(after.allocations, before.allocations, "{rows} rows");
    }
}
