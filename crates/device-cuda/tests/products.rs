//! Products beyond the shared cases: every kernel's tile sizes, weights that are widened for cuBLASLt, launches that weights share.

mod common;

use baton_device::conformance::{self, Case, Layout, random_blocks, uniform};
use baton_device::{
    Backend, BlockFormat, Code, CodedRows, CodedSource, Coding, DType, DeviceError, HostLinear, HostTensor, Purpose,
    Result, RowSource, Rows, WeightFormat, WeightFormat::BF16, WeightFormat::F16, WeightFormat::F32, widen,
};
use baton_device_cuda::{CudaBackend, CudaOptions};
use common::{Simulator, options};

const Q4_0: WeightFormat = WeightFormat::Ggml(BlockFormat::Q4_0);
const Q4_K: WeightFormat = WeightFormat::Ggml(BlockFormat::Q4_K);
const Q6_K: WeightFormat = WeightFormat::Ggml(BlockFormat::Q6_K);
const Q8_0: WeightFormat = WeightFormat::Ggml(BlockFormat::Q8_0);

/// Judged more closely than the shared cases are: what a kernel rounds is its result, and floats that meet another type.
fn judged(activations: DType, cases: &[(usize, usize, usize, WeightFormat)]) {
    let case = |&(rows, in_features, out_features, format)| {
        let case = Case::Linear { rows, in_features, out_features, format, bias: rows % 3 != 0 };
        (case, format == F32)
    };
    judged_cases(activations, cases.iter().map(case));
}

/// As [`judged`], of cases and whether weights in f32 meet f32 in them.
fn judged_cases(activations: DType, cases: impl Iterator<Item = (Case, bool)>) {
    let Some(simulator) = Simulator::new() else { return };
    simulator.control("order=5");
    // Whatever a kernel touches beyond a buffer is a fault.
    let backend = CudaBackend::new(&CudaOptions { isolated: true, ..options(activations) }).unwrap();
    for (case, wide) in cases {
        let outcome = conformance::run(&case, &backend).unwrap();
        let wanted = if wide || activations == DType::F32 { 1.0 } else { 0.5 } * outcome.tolerance;
        assert!(outcome.max_error() <= wanted, "{case:?} in {activations}: {} over {wanted}", outcome.max_error());
    }
    drop(backend);
    simulator.expect_clean();
}

#[test]
fn rows_that_fill_tiles_and_rows_that_do_not_give_the_judges_numbers() {
    let rows = [8, 9, 16, 31, 32, 33, 63, 64];
    let cases = rows.map(|rows| [(rows, 384, 33, Q4_0), (rows, 256, 17, Q4_K), (rows, 128, 40, BF16)]);
    judged(DType::BF16, cases.as_flattened());
    judged(DType::F16, &[(9, 256, 17, Q6_K), (33, 512, 17, Q6_K), (64, 32, 5, Q8_0), (20, 100, 9, BF16)]);
    // Columns in parts of their own, an odd number of spans and no whole one at the end; and features of several blocks.
    judged(DType::BF16, &[(20, 1312, 150, Q8_0), (64, 2048, 3, Q4_K), (33, 1100, 20, F16), (64, 128, 300, Q4_0)]);
}

#[test]
fn codes_give_the_judges_numbers_in_every_tile_and_where_they_are_widened() {
    let fp8 = Layout { code: Code::E4M3, block: [32, 128], scales: DType::F32, zeros: false, shuffled: false };
    let int4 = Layout { code: Code::Int4, block: [1, 64], scales: DType::F16, zeros: true, shuffled: true };
    let int8 = Layout { code: Code::Int8, block: [1, 0], scales: DType::BF16, zeros: true, shuffled: false };
    let e2m1 = Layout { code: Code::E2M1, block: [1, 32], scales: DType::BF16, zeros: false, shuffled: false };
    let e5m2 = Layout { code: Code::E5M2, block: [0, 0], scales: DType::F32, zeros: false, shuffled: false };
    let case = |(rows, in_features, out_features, layout)| {
        (Case::Coded { rows, in_features, out_features, layout, bias: rows % 3 != 0 }, false)
    };
    let cases = [(9, 264, 33, fp8), (31, 1160, 70, fp8), (64, 384, 40, int4), (65, 300, 33, fp8), (70, 320, 17, int4)];
    let others = [(13, 203, 39, int8), (40, 165, 21, e2m1), (3, 139, 51, e5m2)];
    judged_cases(DType::BF16, cases.into_iter().chain(others).map(case));
    judged_cases(DType::F32, [(5, 264, 33, fp8), (66, 320, 17, int4)].into_iter().map(case));
}

/// Rows of one code, in groups of 32 that are dealt out among the columns in some order.
#[derive(Debug)]
struct Dealt(Coding, usize);

impl RowSource for Dealt {
    fn rows(&self, rows: std::ops::Range<usize>) -> Vec<f32> {
        widen(self, rows)
    }

    fn as_coded(&self) -> Option<&dyn CodedSource> {
        Some(self)
    }
}

impl CodedSource for Dealt {
    fn coding(&self) -> &Coding {
        &self.0
    }

    fn codes(&self, rows: std::ops::Range<usize>) -> CodedRows {
        CodedRows {
            codes: rows
                .clone()
                .flat_map(|row| (0..self.0.group_of.len()).map(move |c| ((row + c) % 16) as u8))
                .collect(),
            scales: rows.flat_map(|row| (0..self.0.groups).map(move |group| 1.0 + (row + group) as f32)).collect(),
            zeros: Vec::new(),
        }
    }
}

impl Dealt {
    fn new(rows: usize, step: u32) -> Self {
        let group_of = (0..128).map(|column| column * step % 128 / 32).collect();
        Self(Coding { code: Code::Int4, scales: DType::F32, zeros: false, groups: 4, group_of }, rows)
    }

    fn linear<B: Backend>(&self, b: &B, purpose: Purpose) -> Result<B::Linear> {
        let weight = HostTensor::computed("w", [self.1, 128], self);
        b.linear_weight(&HostLinear { weight, bias: None, format: WeightFormat::Coded(Code::Int4), purpose })
    }
}

#[test]
fn weights_whose_columns_lie_alike_share_rows_in_that_order_and_a_table_is_refused() {
    let Some(simulator) = Simulator::new() else { return };
    let backend = simulator.open(DType::F32);
    let (alike, other) = ([Dealt::new(5, 5), Dealt::new(9, 5)], Dealt::new(7, 11));
    let sources = [&alike[0], &other, &alike[1]];
    let linears: Vec<_> = sources.iter().map(|source| source.linear(&backend, Purpose::Product).unwrap()).collect();
    let mut x = backend.tensor(2, 128).unwrap();
    let rows: Vec<f32> = (0..256).map(|i| (i % 7) as f32 - 3.0).collect();
    backend.write(&rows, &mut x).unwrap();
    let mut outs: Vec<_> = sources.iter().map(|source| backend.tensor(2, source.1).unwrap()).collect();
    let before = backend.statistics().launches;
    backend.linear_group(&x, &mut linears.iter().zip(&mut outs).collect::<Vec<_>>()).unwrap();
    for (source, out) in sources.iter().zip(&outs) {
        let (weights, mut values) = (source.rows(0..source.1), Vec::new());
        backend.read(out, &mut values).unwrap();
        let product = |row: &[f32], weight: &[f32]| row.iter().zip(weight).map(|(x, w)| x * w).sum::<f32>();
        let expected = rows.chunks(128).flat_map(|row| weights.chunks(128).map(move |weight| product(row, weight)));
        assert_eq!(values, expected.collect::<Vec<_>>());
    }
    // An order of rows and a product for each of two orders.
    assert_eq!(backend.statistics().launches - before, 4);
    match alike[0].linear(&backend, Purpose::Table).map(|_| ()) {
        Err(DeviceError::Format { reason, .. }) => assert!(reason.contains("rows are looked up"), "{reason}"),
        other => panic!("{other:?}"),
    }
    drop((linears, x, outs, backend));
    simulator.expect_clean();
}

#[test]
fn weights_are_widened_for_many_rows() {
    judged(
        DType::BF16,
        &[
            (65, 64, 33, Q8_0),
            (130, 256, 9, Q6_K),
            (70, 33, 20, F16),
            (66, 40, 24, F16),
            (65, 33, 7, F32),
            (67, 40, 24, BF16),
        ],
    );
    judged(DType::F16, &[(65, 33, 20, BF16), (66, 40, 24, BF16), (96, 256, 40, Q4_K), (68, 40, 25, F16)]);
    judged(DType::F32, &[(65, 33, 20, BF16), (66, 256, 24, Q4_K), (67, 64, 9, F16), (68, 37, 9, F32)]);
}

#[test]
fn a_sum_is_shared_out_among_any_number_of_warps() {
    let widths = [8, 120, 136, 264, 520, 1032, 1160, 2056];
    judged(DType::BF16, &widths.map(|k| (3, k, 19, BF16)));
    judged(DType::F32, &widths.map(|k| (3, k, 3, F32)));
}

#[test]
fn a_weight_too_large_to_be_widened_at_once_is_widened_in_parts() {
    // Of each row one column is asked for, so that what is expected is known without a product.
    let (n, k, rows) = (300, 1 << 16, 65);
    let blocks = random_blocks(BlockFormat::Q8_0, 3, n * k, 1.0);
    let weight = HostTensor::new("w", DType::Ggml(BlockFormat::Q8_0), vec![n, k], &blocks);
    let column = |row: usize| row * 997 % k;
    let Some(simulator) = Simulator::new() else { return };
    let backend = simulator.open(DType::BF16);
    let linear = backend
        .linear_weight(&HostLinear { weight: weight.clone(), bias: None, format: Q8_0, purpose: Purpose::Product })
        .unwrap();
    let mut x = vec![0.0; rows * k];
    (0..rows).for_each(|row| x[row * k + column(row)] = 1.0);
    let (mut input, mut out, mut values) =
        (backend.tensor(rows, k).unwrap(), backend.tensor(rows, n).unwrap(), Vec::new());
    backend.write(&x, &mut input).unwrap();
    backend.linear(&input, &linear, &mut out).unwrap();
    backend.read(&out, &mut values).unwrap();
    for feature in 0..n {
        let weights = weight.rows(feature, 1).to_f32();
        for row in 0..rows {
            let expected = half::bf16::from_f32(weights[column(row)]).to_f32();
            assert_eq!(values[row * n + feature], expected, "feature {feature} of row {row}");
        }
    }
    assert!(simulator.count("kernels.unpack<Q8_0, bf16>") > 1);
}

/// What [`products`] is asked of each weight: the result.
fn products<B: Backend>(
    b: &B,
    rows: usize,
    weights: &[(usize, WeightFormat)],
    together: bool,
) -> Result<Vec<Vec<f32>>> {
    const K: usize = 1024;
    let mut linears = Vec::new();
    for (seed, &(n, format)) in (1..).zip(weights) {
        let values = uniform(seed, n * K, 0.1);
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let bias: Vec<u8> = values[..n].iter().flat_map(|v| v.to_le_bytes()).collect();
        let weight = HostTensor::new("w", DType::F32, vec![n, K], &bytes);
        let bias = (n % 2 == 1).then(|| HostTensor::new("b", DType::F32, vec![n], &bias));
        linears.push(b.linear_weight(&HostLinear { weight, bias, format, purpose: Purpose::Product })?);
    }
    let mut x = b.tensor(rows, K)?;
    b.write(&uniform(99, rows * K, 1.0), &mut x)?;
    let mut outs = weights.iter().map(|(n, _)| b.tensor(rows, *n)).collect::<Result<Vec<_>>>()?;
    let mut pairs: Vec<_> = linears.iter().zip(&mut outs).collect();
    match together {
        true => b.linear_group(&x, &mut pairs)?,
        false => pairs.into_iter().try_for_each(|(weight, out)| b.linear(&x, weight, out))?,
    }
    outs.iter()
        .map(|out| {
            let mut values = Vec::new();
            b.read(out, &mut values)?;
            assert_eq!(values.len(), out.rows() * out.cols());
            Ok(values)
        })
        .collect()
}

#[test]
fn a_group_gives_the_bits_of_its_weights_alone_in_as_many_launches_as_it_has_formats() {
    let Some(simulator) = Simulator::new() else { return };
    // Few, so that sums of wide weights are cut into fewer parts than those of narrow ones.
    simulator.control("sms=2");
    let backend = simulator.open(DType::BF16);
    let weights =
        [(40, BF16), (7, Q4_K), (1, BF16), (16, F32), (33, BF16), (150, Q4_K), (5, BF16), (17, BF16), (3, F16)];
    for rows in [1, 11, 40] {
        let alone = products(&backend, rows, &weights, false).unwrap();
        assert_eq!(products(&backend, rows, &weights, true).unwrap(), alone, "{rows} rows");
    }
    drop(backend);
    let backend = simulator.open(DType::BF16);
    let before = backend.statistics().launches;
    products(&backend, 1, &weights, true).unwrap();
    // Five weights in bf16 are one launch and another, as four go together.
    assert_eq!(backend.statistics().launches - before, 5);
    // A wide one is cuBLASLt's; narrow ones stay together with more rows too, and their parts are added up together.
    let weights = [(40, BF16), (33, BF16), (2056, BF16), (17, BF16)];
    let alone = products(&backend, 40, &weights, false).unwrap();
    let before = backend.statistics().launches;
    assert_eq!(products(&backend, 40, &weights, true).unwrap(), alone);
    assert_eq!(backend.statistics().launches - before, 3);
}

#[test]
fn weights_meet_rows_that_a_weight_in_f32_gave() {
    let Some(simulator) = Simulator::new() else { return };
    for (activations, tolerance) in [(DType::BF16, 2e-2), (DType::F16, 4e-3), (DType::F32, 2e-5)] {
        let backend = simulator.open(activations);
        for rows in [2, 70] {
            let [ours, judges] =
                [chain(&backend, rows), chain(&baton_device::Reference::new(), rows)].map(Result::unwrap);
            for (a, b) in ours.iter().zip(&judges) {
                assert!((a - b).abs() < tolerance, "{a} for {b} in {activations}, {rows} rows");
            }
        }
    }
}

/// A weight in f32, and behind it one of each other kind.
fn chain<B: Backend>(b: &B, rows: usize) -> Result<Vec<f32>> {
    let weight = |seed: u64, [n, k]: [usize; 2], format: WeightFormat| {
        let bytes: Vec<u8> = uniform(seed, n * k, 0.2).iter().flat_map(|v| v.to_le_bytes()).collect();
        let weight = HostTensor::new("w", DType::F32, vec![n, k], &bytes);
        b.linear_weight(&HostLinear { weight, bias: None, format, purpose: Purpose::Product })
    };
    let first = weight(1, [64, 33], F32)?;
    let (mut x, mut wide) = (b.tensor(rows, 33)?, b.tensor(rows, 64)?);
    // Numbers that every type holds.
    b.write(&uniform(2, rows * 33, 1.0).iter().map(|v| (v * 64.0).round() / 64.0).collect::<Vec<_>>(), &mut x)?;
    b.linear(&x, &first, &mut wide)?;
    let (mut all, mut values) = (Vec::new(), Vec::new());
    for format in [F32, F16, BF16, Q8_0] {
        let mut out = b.tensor(rows, 12)?;
        b.linear(&wide, &weight(3, [12, 64], format)?, &mut out)?;
        b.read(&out, &mut values)?;
        all.extend_from_slice(&values);
    }
    Ok(all)
}
