//! Weights through the simulator: which are brought into FRACTAL_NZ, that products with them are the judge's, and what is left
//! behind where that fails.

mod common;

use baton_device::{
    Backend, DType, DeviceError, HostLinear, HostTensor, Purpose, Reference, WeightFormat, conformance,
};
use baton_device_ascend::{AscendBackend, AscendOptions, Search};
use common::{A2, A3, P310, Simulator, line, options, simulator};

const TO_BLOCKS: &str = "aclnnTransMatmulWeight";

/// Rows of a weight, in a type.
fn matrix(format: WeightFormat, [out, into]: [usize; 2]) -> (DType, Vec<u8>) {
    let values = conformance::uniform(1, out * into, 0.2);
    match format {
        WeightFormat::F16 => (DType::F16, values.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect()),
        _ => (DType::BF16, values.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect()),
    }
}

/// The product of some rows with a weight that was prepared for a purpose.
fn product<B: Backend>(
    backend: &B,
    format: WeightFormat,
    dims: [usize; 2],
    purpose: Purpose,
) -> Result<Vec<f32>, DeviceError> {
    const ROWS: usize = 3;
    let (dtype, bytes) = matrix(format, dims);
    let weight = HostTensor::new("weight", dtype, dims.to_vec(), &bytes);
    let weight = backend.linear_weight(&HostLinear { weight, bias: None, format, purpose })?;
    let (mut x, mut out) = (backend.tensor(ROWS, dims[1])?, backend.tensor(ROWS, dims[0])?);
    // Multiples that every type holds.
    let values: Vec<f32> =
        conformance::uniform(2, ROWS * dims[1], 1.0).iter().map(|x| (x * 64.0).round() / 64.0).collect();
    backend.write(&values, &mut x)?;
    backend.linear(&x, &weight, &mut out)?;
    let mut values = Vec::new();
    backend.read(&out, &mut values)?;
    Ok(values)
}

fn near(actual: &[f32], expected: &[f32]) -> bool {
    actual.len() == expected.len() && actual.iter().zip(expected).all(|(a, e)| (a - e).abs() <= 1e-2)
}

#[test]
fn weights_of_products_lie_in_blocks_and_all_others_in_rows() {
    let simulator = Simulator::new();
    for (chip, dtype, format) in [
        (A2, DType::BF16, WeightFormat::BF16),
        (A2, DType::F16, WeightFormat::F16),
        (A3, DType::BF16, WeightFormat::BF16),
        (P310, DType::F16, WeightFormat::F16),
    ] {
        let backend = simulator.open_fused(chip, dtype);
        for dims in [[48, 64], [17, 33], [2, 700]] {
            let [out, into] = dims;
            let judged = product(&Reference::new(), format, dims, Purpose::Product).unwrap();
            // A shape is tried once; then each weight is brought into blocks.
            for (purpose, times) in
                [(Purpose::Product, 2), (Purpose::Product, 1), (Purpose::Table, 0), (Purpose::Adapter, 0)]
            {
                simulator.reset();
                let actual = product(&backend, format, dims, purpose).unwrap();
                assert!(near(&actual, &judged), "{chip} {dims:?} {purpose:?}");
                let launches = simulator.report()["launches"][TO_BLOCKS].as_u64().unwrap_or(0);
                assert_eq!(launches, times, "{chip} {dims:?} {purpose:?}: {:?}", backend.forms());
            }
            assert_eq!(
                [line(&backend, &format!("weight of {out} by {into}")), line(&backend, &format!("table of {out}"))],
                [
                    format!("weight of {out} by {into} in {format}: FRACTAL_NZ"),
                    format!("table of {out} by {into} in {format}: rows (not FRACTAL_NZ: rows are looked up)"),
                ]
            );
        }
        for dims in [[1, 32], [32, 1]] {
            product(&backend, format, dims, Purpose::Product).unwrap();
            assert!(line(&backend, &format!("weight of {} by", dims[0])).contains("several rows and columns"));
        }
        assert!(product(&backend, WeightFormat::F32, [5, 7], Purpose::Product).is_ok());
        assert!(line(&backend, "weight of 5 by 7 in f32").contains("it takes f16 and bf16"));
        drop(backend);
        simulator.expect_clean();
    }
}

#[test]
fn without_fused_forms_weights_stay_rows() {
    let simulator = Simulator::new();
    let strict = simulator.open(A2, DType::BF16);
    product(&strict, WeightFormat::BF16, [17, 33], Purpose::Product).unwrap();
    assert_eq!(simulator.report()["launches"].get(TO_BLOCKS), None);
    assert_eq!(line(&strict, "weight"), "weight of 17 by 33 in bf16: rows (not FRACTAL_NZ: fused forms are off)");
}

#[test]
fn a_weight_in_blocks_takes_the_memory_of_its_blocks_and_nothing_beside() {
    let simulator = Simulator::new();
    let backend = simulator.open_fused(A2, DType::BF16);
    let dims = [600, 1000];
    let (dtype, bytes) = matrix(WeightFormat::BF16, dims);
    let make = || {
        let weight = HostTensor::new("weight", dtype, dims.to_vec(), &bytes);
        let (format, purpose) = (WeightFormat::BF16, Purpose::Product);
        backend.linear_weight(&HostLinear { weight, bias: None, format, purpose }).unwrap()
    };
    let before = backend.memory_use().unwrap().used;
    let weights = [make(), make()];
    // 63 by 38 blocks of 512 bytes, and what a block of memory has behind its end.
    assert_eq!(backend.memory_use().unwrap().used - before, 2 * (63 * 38 * 512 + 512));
    drop(weights);
    assert_eq!(backend.memory_use().unwrap().used, before);
}

#[test]
fn what_fails_while_a_weight_is_brought_into_blocks_leaves_nothing_behind() {
    let simulator = Simulator::new();
    let dims = [40, 24];
    let load = |fault: &str| {
        let backend = simulator.open_fused(A2, DType::BF16);
        simulator.control(&format!("fault={fault}"));
        let result = product(&backend, WeightFormat::BF16, dims, Purpose::Product);
        let lines = backend.forms();
        drop(backend);
        simulator.calm();
        simulator.expect_clean();
        (result, lines)
    };
    // Of the trial: the weight stays rows. Behind it: an error, and another weight may do.
    for fault in ["aclnnCalculateMatmulWeightSizeV2:1:161002", "aclnnTransMatmulWeightGetWorkspaceSize:1:561002"] {
        let (result, lines) = load(fault);
        assert!(result.is_ok() && lines[0].contains("rows (not FRACTAL_NZ: aclnn"), "{fault}: {lines:?}");
    }
    let (result, lines) = load("aclnnTransMatmulWeightGetWorkspaceSize:2:561002");
    assert!(matches!(result, Err(DeviceError::Execution { .. })), "{lines:?}");
    assert!(lines[0].ends_with(": FRACTAL_NZ"), "{lines:?}");
}

#[test]
fn without_the_functions_in_the_libraries_weights_stay_rows() {
    let _turn = Simulator::new();
    for name in ["aclnnTransMatmulWeight", "aclnnCalculateMatmulWeightSizeV2"] {
        let folder = simulator::without(name);
        let search = Search { folder: Some(folder.path().to_owned()) };
        let backend = AscendBackend::new(&AscendOptions { fused: true, search, ..options(DType::BF16) }).unwrap();
        let actual = product(&backend, WeightFormat::BF16, [17, 33], Purpose::Product).unwrap();
        let judged = product(&Reference::new(), WeightFormat::BF16, [17, 33], Purpose::Product).unwrap();
        assert!(near(&actual, &judged), "{name}");
        assert!(line(&backend, "weight").ends_with(&format!("(not FRACTAL_NZ: CANN's libraries have no {name})")));
    }
}
