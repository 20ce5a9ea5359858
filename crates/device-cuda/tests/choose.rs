//! Tokens beyond the shared cases: rows of every kind against the judge, threads in any order, and steps that begin with tokens
//! that have not come to the host.

mod common;

use baton_device::conformance::uniform;
use baton_device::{Backend, DType, Draw, Drawer, HostLinear, HostTensor, Purpose, TokenId, TokenIds, WeightFormat};
use baton_device_cuda::CudaBackend;
use common::Simulator;

/// Rows of `cols` logits that differ in how they are spread, all numbers that bf16 holds.
fn rows(cols: usize) -> Vec<Vec<f32>> {
    let noise = uniform(cols as u64, cols, 8.0);
    let bf16 = |x: f32| f32::from_bits(x.to_bits() & 0xffff_0000);
    let row = |of: &dyn Fn(usize) -> f32| (0..cols).map(|i| bf16(of(i))).collect::<Vec<f32>>();
    let mut rows = vec![
        row(&|i| noise[i]),
        // Many are equal.
        row(&|i| noise[i].round() / 2.0),
        row(&|_| -3.0),
        // Both zeros are one number.
        row(&|i| if noise[i] > 0.0 { 0.0 } else { -0.0 }),
        row(&|i| noise[i] * 0.01),
        row(&|i| noise[i] * 4e37),
        row(&|i| noise[i] * 1e-5),
        // All but one are far below.
        row(&|i| if i == cols / 3 { 0.0 } else { noise[i] - 40.0 }),
        row(&|i| if i % 3 == 0 { f32::MAX } else { f32::MIN }),
    ];
    let mut faulty = rows[0].clone();
    faulty[cols / 2] = f32::INFINITY;
    rows.push(faulty);
    rows
}

/// Draws of every kind with numbers from all over.
fn draws(seed: u64, count: usize) -> Vec<Draw> {
    let random = uniform(seed, 6 * count, 0.5);
    let draw = |random: &[f32; 6]| {
        let [a, b, c, d, e, f] = random.map(|x| x + 0.5);
        let of = |x: f32, n: usize| ((x * n as f32) as usize).min(n - 1);
        Draw {
            temperature: [0.0, 0.01, 0.5, 1.0, 3.0, 100.0, 1e-39][of(a, 7)],
            top_k: [0, 0, 1, 2, 40, 5000, u32::MAX][of(b, 7)],
            top_p: [1.0, 1.0, 0.0, 1e-6, 0.3, 0.95, c][of(c * 977.0 % 1.0, 7)],
            min_p: [0.0, 0.0, 1e-3, 0.2, 1.0, 1.5][of(d, 6)],
            uniform: [0.0, 1.0 - f64::EPSILON, f64::from(f)][of(e, 3)],
        }
    };
    random.as_chunks().0.iter().map(draw).collect()
}

/// That the random number lies in the token's part of the whole, or so near to it that other sums explain it.
fn judge(drawer: &mut Drawer, row: &[f32], draw: &Draw, token: Option<u32>) {
    let widened: Vec<f64> = row.iter().map(|l| f64::from(*l)).collect();
    let Some(token) = token else {
        assert!(row.iter().any(|l| !l.is_finite()), "no token for {draw:?}");
        return;
    };
    let candidates = drawer.candidates(&widened, draw);
    let total: f64 = candidates.iter().map(|c| c.1).sum();
    let before: f64 = candidates.iter().take_while(|c| c.0 < token).map(|c| c.1).sum();
    let weight = candidates.iter().find(|c| c.0 == token).map(|c| c.1);
    let weight = weight.unwrap_or_else(|| panic!("{token} of {} is none of {draw:?}", row.len()));
    let (start, end) = (before / total - 1e-6, (before + weight) / total + 1e-6);
    assert!((start..=end).contains(&draw.uniform), "{token} of {} in {start}..{end} for {draw:?}", row.len());
}

fn choose(b: &CudaBackend, rows: &[Vec<f32>], draws: &[Draw]) -> Vec<Option<u32>> {
    let mut logits = b.tensor(rows.len(), rows[0].len()).unwrap();
    b.write(&rows.concat(), &mut logits).unwrap();
    let mut chosen = vec![Some(7); 3];
    b.read_chosen(&b.choose(&logits, draws).unwrap(), &mut chosen).unwrap();
    chosen
}

#[test]
fn every_draw_of_every_row_is_the_judges() {
    let Some(simulator) = Simulator::new() else { return };
    let mut drawer = Drawer::default();
    for dtype in [DType::F32, DType::BF16] {
        let b = simulator.open(dtype);
        for (cols, times) in [(1, 20), (7, 60), (255, 60), (1000, 60), (9001, 6), (129_283, 1), (129_280, 1)] {
            let rows = rows(cols);
            for seed in 0..times {
                let draws = draws(1000 * cols as u64 + seed, rows.len());
                let chosen = choose(&b, &rows, &draws);
                assert_eq!(chosen.last(), Some(&None));
                for ((row, draw), token) in rows.iter().zip(&draws).zip(&chosen) {
                    judge(&mut drawer, row, draw, *token);
                }
            }
        }
    }
    simulator.expect_clean();
}

#[test]
fn each_id_is_drawn_by_the_numbers_of_its_part() {
    let Some(simulator) = Simulator::new() else { return };
    let b = simulator.open(DType::F32);
    let mut drawer = Drawer::default();
    // Parts of a quarter, none, a half and a quarter; of what top_k, top_p and min_p leave the two likely ones have all.
    let row = [0.0, -100.0, 2f32.ln(), 0.0];
    let plain = Draw { temperature: 1.0, ..Draw::LARGEST };
    let all = (0..400).map(|i| Draw { uniform: f64::from(i) / 400.0 + 1e-4, ..plain });
    let cut = [Draw { top_k: 1, ..plain }, Draw { top_p: 0.5, ..plain }, Draw { min_p: 0.6, ..plain }];
    let tie = Draw { top_p: 0.6, uniform: 0.1, ..plain };
    let flat = Draw { temperature: f32::INFINITY, uniform: 0.26, ..plain };
    let draws: Vec<Draw> = all.chain(cut).chain([tie, flat]).collect();
    let chosen = choose(&b, &vec![row.to_vec(); draws.len()], &draws);
    draws.iter().zip(&chosen).for_each(|(draw, token)| judge(&mut drawer, &row, draw, *token));
    let count = |id| chosen[..400].iter().filter(|token| **token == Some(id)).count();
    assert_eq!([0, 1, 2, 3].map(count), [100, 0, 200, 100]);
    // Of two equals the first is in the nucleus.
    assert_eq!(chosen[400..], [2, 2, 2, 0, 1].map(Some));
}

#[test]
fn the_order_of_threads_and_the_other_rows_decide_nothing() {
    let Some(simulator) = Simulator::new() else { return };
    for cols in [1000, 20_000] {
        let (rows, draws) = (rows(cols), draws(5, 10));
        let chosen = |order: &str| {
            simulator.control(order);
            choose(&simulator.open(DType::BF16), &rows, &draws)
        };
        let forward = chosen("order=forward");
        for order in ["order=reverse", "order=77"] {
            assert_eq!(chosen(order), forward, "{order}");
        }
        let b = simulator.open(DType::BF16);
        for ((row, draw), token) in rows.iter().zip(&draws).zip(&forward) {
            assert_eq!(choose(&b, std::slice::from_ref(row), &[*draw]), [*token]);
        }
    }
}

#[test]
fn chosen_tokens_are_looked_up_as_known_ones_are() {
    let Some(simulator) = Simulator::new() else { return };
    let b = simulator.open(DType::F32);
    let (rows, cols) = (rows(255), 255);
    let table = uniform(3, cols * 4, 1.0);
    let bytes: Vec<u8> = table.iter().flat_map(|v| v.to_le_bytes()).collect();
    let weight = HostTensor::new("table", DType::F32, vec![cols, 4], &bytes);
    let (format, purpose) = (WeightFormat::F32, Purpose::Table);
    let weight = b.linear_weight(&HostLinear { weight, bias: None, format, purpose }).unwrap();
    let mut logits = b.tensor(rows.len(), cols).unwrap();
    b.write(&rows.concat(), &mut logits).unwrap();
    let tokens = b.choose(&logits, &draws(1, rows.len())).unwrap();
    let (mut out, mut looked_up, mut chosen) = (b.tensor(4, 4).unwrap(), Vec::new(), Vec::new());
    // The last has none: any row will do.
    let order = [TokenId::Chosen(3), TokenId::Known(254), TokenId::Chosen(3), TokenId::Chosen(9)];
    b.embed(TokenIds::Chosen { tokens: &tokens, ids: &order }, &weight, &mut out).unwrap();
    b.read(&out, &mut looked_up).unwrap();
    b.read_chosen(&tokens, &mut chosen).unwrap();
    for (id, values) in order.iter().zip(looked_up.chunks_exact(4)) {
        let id = match *id {
            TokenId::Known(id) => id,
            TokenId::Chosen(row) => chosen[row as usize].unwrap_or(0),
        };
        assert_eq!(values, &table[4 * id as usize..][..4]);
    }
}
