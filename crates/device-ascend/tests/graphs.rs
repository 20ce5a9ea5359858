//! Pieces of steps as graphs, through the simulator: the same numbers as without, bit for bit, whatever happens in between;
//! and what fails is typed and leaves nothing.

mod common;

use std::collections::BTreeMap;

use baton_device::conformance::uniform;
use baton_device::{
    AttentionBatch, Backend, DType, DeviceError, HostLinear, HostTensor, KvBlocks, KvDtype, KvSpec, Purpose, Result,
    SequenceSpan, TokenIds, WeightFormat,
};
use baton_device_ascend::{AscendBackend, AscendOptions, Class, describe};
use common::layer::{EPS, HIDDEN, KvCache, LLAMA_KV, Linear, Llama, Maker, Scratch, Tensor, Vector};
use common::{A2, P310, Simulator, options};

const VOCAB: usize = 40;
const LAYERS: usize = 2;
/// Sequences that there are blocks for, three each.
const SEQUENCES: usize = 4;
const PROMPT: usize = 9;

/// A small decoder.
struct Decoder<'a> {
    make: Maker<'a>,
    embedding: Linear,
    layers: Vec<Llama>,
    norm: Vector,
    cache: KvCache,
    scratch: Scratch,
    picked: Tensor,
    logits: Tensor,
}

impl<'a> Decoder<'a> {
    fn new(backend: &'a AscendBackend) -> Self {
        let make = Maker { backend, rows: SEQUENCES * PROMPT };
        let spec = KvSpec { layers: vec![LLAMA_KV; LAYERS], dtype: KvDtype::BF16, block_size: 128 };
        Self {
            make,
            embedding: make.purposed(7, VOCAB, HIDDEN, Purpose::Table),
            layers: (0..LAYERS as u64).map(|seed| Llama::new(make, seed + 1)).collect(),
            norm: make.norm(HIDDEN),
            cache: backend.kv_cache(&spec, KvBlocks::kept(3 * SEQUENCES)).unwrap(),
            scratch: Scratch::new(make),
            picked: make.tensor(HIDDEN),
            logits: make.tensor(VOCAB),
        }
    }

    /// A step of sequences `0..sequences`, with the same number of tokens each; logits of their last.
    fn step(&mut self, sequences: usize, start: usize, len: usize, adapter: Option<&Linear>) -> Result<Vec<f32>> {
        let backend = self.make.backend;
        let tables: Vec<[u32; 3]> = (0..sequences as u32).map(|s| [3 * s + 1, 3 * s, 3 * s + 2]).collect();
        let span = |table| SequenceSpan { start, len, block_table: table, passing_table: &[] };
        let spans: Vec<_> = tables.iter().map(|table| span(table.as_slice())).collect();
        let ids: Vec<u32> = (0..sequences * len).map(|i| ((7 * i + 3 * start) % VOCAB) as u32).collect();
        let last: Vec<u32> = (0..sequences).map(|s| (s * len + len - 1) as u32).collect();
        let plan = backend.plan_attention(&AttentionBatch { sequences: &spans })?;
        let x = &mut self.scratch;
        backend.embed(TokenIds::Known(&ids), &self.embedding, &mut x.residual)?;
        backend.embed(TokenIds::Known(&ids), &self.embedding, &mut x.delta)?;
        for (number, layer) in self.layers.iter().enumerate() {
            layer.run(backend, x, &mut self.cache, number, &plan)?;
            if let Some(adapter) = adapter {
                backend.linear(&x.residual, adapter, &mut x.delta)?;
            }
        }
        backend.add_rms_norm(&x.delta, &mut x.residual, &self.norm, EPS, &mut self.picked)?;
        backend.gather_rows(&self.picked, &last, &mut x.delta)?;
        backend.linear(&x.delta, &self.embedding, &mut self.logits)?;
        let mut logits = Vec::new();
        backend.read(&self.logits, &mut logits)?;
        Ok(logits)
    }

    fn decode(&mut self, sequences: usize, positions: std::ops::Range<usize>) -> Vec<Vec<f32>> {
        positions.map(|position| self.step(sequences, position, 1, None).unwrap()).collect()
    }
}

/// Calls of functions that were counted.
fn calls(simulator: &Simulator) -> BTreeMap<String, u64> {
    serde_json::from_value(simulator.report()["calls"].clone()).unwrap()
}

fn graph_runs(simulator: &Simulator) -> u64 {
    calls(simulator).get("aclmdlRIExecuteAsync").copied().unwrap_or(0)
}

fn prepared(simulator: &Simulator) -> u64 {
    calls(simulator).iter().filter(|(name, _)| name.ends_with("GetWorkspaceSize")).map(|(_, n)| n).sum()
}

/// What a device computes that makes graphs, and one that is not allowed any.
fn with_and_without<T>(work: impl Fn(&Simulator, &AscendBackend) -> T) -> [T; 2] {
    let simulator = Simulator::new();
    [false, true].map(|refused| {
        let backend = simulator.open_fused(A2, DType::BF16);
        if refused {
            simulator.control("fault=aclmdlRICaptureBegin:1:207000");
        }
        let result = work(&simulator, &backend);
        let runs = graph_runs(&simulator);
        assert_eq!(runs == 0, refused, "graphs that ran: {runs}");
        let line = backend.forms().pop().unwrap();
        assert!(if refused { line.contains("207000") } else { line.ends_with("graphs") }, "{line}");
        drop(backend);
        simulator.expect_clean();
        simulator.reset();
        result
    })
}

#[test]
fn decode_across_blocks_gives_the_same_numbers_with_a_tenth_of_the_first_phases() {
    let [with, without] = with_and_without(|simulator, backend| {
        let mut decoder = Decoder::new(backend);
        decoder.step(SEQUENCES, 0, PROMPT, None).unwrap();
        let mut logits = decoder.decode(SEQUENCES, PROMPT..125);
        let counted = |decoder: &mut Decoder<'_>, positions| {
            let before = [prepared(simulator), graph_runs(simulator)];
            let logits = decoder.decode(SEQUENCES, positions);
            let after = [prepared(simulator), graph_runs(simulator)];
            (logits, [after[0] - before[0], after[1] - before[1]])
        };
        // The second block begins at 128: nothing of it shows in the pieces.
        let (more, cost) = counted(&mut decoder, 125..135);
        logits.extend(more);
        logits.extend(decoder.decode(SEQUENCES, 135..140));
        assert_eq!(simulator.report()["violations"].as_array().unwrap().len(), 0);
        (logits, cost)
    });
    assert!(with.0 == without.0, "logits differ");
    assert!(with.0.iter().flatten().all(|x| x.is_finite()));
    let per_step = |cost: [u64; 2]| cost.map(|n| n / 10);
    // With graphs there remain two embeddings, each behind its own numbers, and two attentions.
    assert_eq!([per_step(without.1), per_step(with.1)], [[41, 0], [4, 4]]);
}

#[test]
fn whatever_comes_between_the_steps_the_numbers_are_those_without_graphs() {
    let [with, without] = with_and_without(|simulator, backend| {
        let mut decoder = Decoder::new(backend);
        let mut logits = vec![decoder.step(SEQUENCES, 0, PROMPT, None).unwrap()];
        let mut position = PROMPT;
        let mut go = |decoder: &mut Decoder<'_>, sequences: usize, steps: usize, adapter: Option<&Linear>| {
            for _ in 0..steps {
                logits.push(decoder.step(sequences, position, 1, adapter).unwrap());
                position += 1;
            }
        };
        go(&mut decoder, SEQUENCES, 4, None);
        // Another batch, and back.
        go(&mut decoder, 2, 4, None);
        go(&mut decoder, SEQUENCES, 2, None);
        // Weights come, are used, and go; others take their place in memory. One that is brought into blocks takes the
        // workspace along.
        for (seed, purpose) in [(21, Purpose::Adapter), (22, Purpose::Adapter), (23, Purpose::Product)] {
            let adapter = decoder.make.purposed(seed, HIDDEN, HIDDEN, purpose);
            go(&mut decoder, SEQUENCES, 4, Some(&adapter));
            go(&mut decoder, SEQUENCES, 1, None);
        }
        // Rows in f32 where they were bf16, of the same sizes: another piece at the same addresses.
        let bytes: Vec<u8> = uniform(23, HIDDEN * HIDDEN, 0.1).iter().flat_map(|x| x.to_le_bytes()).collect();
        let weight = HostTensor::new("wide", DType::F32, vec![HIDDEN, HIDDEN], &bytes);
        let wide = backend
            .linear_weight(&HostLinear { weight, bias: None, format: WeightFormat::F32, purpose: Purpose::Adapter })
            .unwrap();
        go(&mut decoder, SEQUENCES, 4, Some(&wide));
        drop(wide);
        // A prompt in the middle, blocks that are cleared, a cache that is made anew.
        logits.push(decoder.step(SEQUENCES, position, PROMPT, None).unwrap());
        logits.extend(decoder.decode(SEQUENCES, position + PROMPT..position + PROMPT + 3));
        backend.clear_blocks(&mut decoder.cache, &[0, 1, 2, 3, 4], &[]).unwrap();
        logits.extend(decoder.decode(SEQUENCES, 3..8));
        let spec = KvSpec { layers: vec![LLAMA_KV; LAYERS], dtype: KvDtype::BF16, block_size: 128 };
        decoder.cache = backend.kv_cache(&spec, KvBlocks::kept(3 * SEQUENCES)).unwrap();
        logits.push(decoder.step(SEQUENCES, 0, PROMPT, None).unwrap());
        logits.extend(decoder.decode(SEQUENCES, PROMPT..PROMPT + 5));
        simulator.expect_no_violation();
        logits
    });
    assert_eq!(with.len(), without.len());
    for (step, (with, without)) in with.iter().zip(&without).enumerate() {
        assert!(with == without, "step {step}");
    }
}

#[test]
fn a_device_whose_memory_was_given_back_makes_its_graphs_anew() {
    let [with, without] = with_and_without(|_, backend| {
        let mut decoder = Decoder::new(backend);
        decoder.step(SEQUENCES, 0, PROMPT, None).unwrap();
        let mut logits = decoder.decode(SEQUENCES, PROMPT..PROMPT + 4);
        // More than there is: everything that is free is given back before it is refused.
        assert!(matches!(backend.tensor(1 << 20, 1 << 10), Err(DeviceError::OutOfMemory { .. })));
        logits.extend(decoder.decode(SEQUENCES, PROMPT + 4..PROMPT + 9));
        logits
    });
    assert!(with == without);
}

/// Steps of a decoder until one fails, which must happen.
fn failing(simulator: &Simulator, fault: &str) -> (DeviceError, Vec<Vec<f32>>, String, u64) {
    let backend = simulator.open_fused(A2, DType::BF16);
    let mut decoder = Decoder::new(&backend);
    decoder.step(SEQUENCES, 0, PROMPT, None).unwrap();
    decoder.decode(SEQUENCES, PROMPT..PROMPT + 3);
    simulator.control(&format!("fault={fault}"));
    let error = (0..3).find_map(|i| decoder.step(SEQUENCES, PROMPT + 3 + i, 1, None).err()).expect("it fails");
    simulator.calm();
    simulator.reset();
    let mut again = |i| decoder.step(SEQUENCES, PROMPT + 3 + i, 1, None);
    let after: Vec<_> = (0..4).map_while(|i| again(i).ok()).collect();
    (error, after, backend.forms().pop().unwrap(), graph_runs(simulator))
}

#[test]
fn a_fault_of_a_graph_is_typed_and_one_that_is_refused_is_the_last() {
    let simulator = Simulator::new();
    let sound = {
        let backend = simulator.open_fused(A2, DType::BF16);
        let mut decoder = Decoder::new(&backend);
        decoder.step(SEQUENCES, 0, PROMPT, None).unwrap();
        decoder.decode(SEQUENCES, PROMPT..PROMPT + 7).split_off(3)
    };
    for (code, fits) in [
        (107026, (|error| matches!(error, DeviceError::Execution { .. })) as fn(&DeviceError) -> bool),
        (507011, |error| matches!(error, DeviceError::Poisoned { .. })),
        (507010, |error| matches!(error, DeviceError::Lost { .. })),
    ] {
        for n in [1, 2, 4] {
            let (error, after, line, runs) = failing(&simulator, &format!("aclmdlRIExecuteAsync:{n}:{code}"));
            let text = error.to_string();
            assert!(
                fits(&error) && text.contains("aclmdlRIExecuteAsync") && text.contains(&code.to_string()),
                "{text}"
            );
            assert!(line.contains("aclmdlRIExecuteAsync"), "{line}");
            assert_eq!(runs, 0, "no graph any more");
            if code == 107026 {
                assert!(after == sound, "the device goes on without");
            } else {
                assert!(after.is_empty(), "and a device that is gone stays so");
            }
            simulator.expect_clean();
        }
    }
}

#[test]
fn an_operator_that_faults_inside_of_a_graph_poisons_the_device() {
    let simulator = Simulator::new();
    let backend = simulator.open_fused(A2, DType::BF16);
    let mut decoder = Decoder::new(&backend);
    decoder.step(SEQUENCES, 0, PROMPT, None).unwrap();
    decoder.decode(SEQUENCES, PROMPT..PROMPT + 1);
    // Of the step in which pieces are captured.
    simulator.control("fault=aclnnMm:5:run");
    match decoder.step(SEQUENCES, PROMPT + 1, 1, None) {
        Err(DeviceError::Poisoned { reason, .. }) => assert!(reason.contains("507015"), "{reason}"),
        other => panic!("{other:?}"),
    }
    drop(decoder);
    drop(backend);
    simulator.expect_clean();
}

#[test]
fn a_capture_that_fails_is_the_last_and_no_step_fails_of_it() {
    let simulator = Simulator::new();
    let run = |fault: Option<&str>| {
        let backend = simulator.open_fused(A2, DType::BF16);
        let mut decoder = Decoder::new(&backend);
        decoder.step(SEQUENCES, 0, PROMPT, None).unwrap();
        let mut logits = decoder.decode(SEQUENCES, PROMPT..PROMPT + 1);
        fault.into_iter().for_each(|fault| simulator.control(&format!("fault={fault}")));
        logits.extend(decoder.decode(SEQUENCES, PROMPT + 1..PROMPT + 4));
        simulator.calm();
        simulator.reset();
        logits.extend(decoder.decode(SEQUENCES, PROMPT + 4..PROMPT + 6));
        let (runs, line) = (graph_runs(&simulator), backend.forms().pop().unwrap());
        drop(decoder);
        drop(backend);
        simulator.expect_clean();
        (logits, line, runs)
    };
    let (sound, line, all) = run(None);
    assert!(line.ends_with("graphs"), "{line}");
    for (fault, kept) in [
        // Streams have run out: what was captured before goes on.
        ("aclmdlRICaptureBegin:1:207008", 0),
        ("aclmdlRICaptureBegin:3:207008", 2),
        ("aclmdlRICaptureEnd:1:507903", 0),
        ("aclmdlRICaptureEnd:2:107025", 1),
        ("aclnnMm:2:561003", 0),
        ("aclnnSiluGetWorkspaceSize:1:107030", 2),
        ("aclrtMemcpyAsync:5:107030", 1),
    ] {
        let (logits, line, runs) = run(Some(fault));
        let [name, _, code] = fault.split(':').collect::<Vec<_>>()[..] else { panic!("{fault}") };
        assert!(line.contains(name.trim_end_matches("GetWorkspaceSize")) && line.contains(code), "{fault}: {line}");
        assert!(logits == sound, "{fault}");
        assert!(all > runs && runs == 2 * kept, "{fault}: {runs} of {all} runs");
    }
}

#[test]
fn any_call_that_fails_while_graphs_are_made_and_run_is_typed_and_leaves_nothing() {
    let simulator = Simulator::new();
    // Of three steps, so that pieces are met, captured and run.
    let run = |fault: Option<String>| {
        let backend = simulator.open_fused(A2, DType::BF16);
        let mut decoder = Decoder::new(&backend);
        decoder.step(SEQUENCES, 0, PROMPT, None).unwrap();
        simulator.reset();
        fault.into_iter().for_each(|fault| simulator.control(&format!("fault={fault}")));
        let positions = PROMPT..PROMPT + 3;
        let result: Result<Vec<_>> = positions.map(|position| decoder.step(SEQUENCES, position, 1, None)).collect();
        simulator.calm();
        let calls = calls(&simulator);
        drop(decoder);
        drop(backend);
        simulator.expect_clean();
        (result, calls)
    };
    let (sound, counts) = run(None);
    let sound = sound.unwrap();
    let (mut failed, mut all) = (0, 0);
    for (turn, (symbol, count)) in counts.into_iter().enumerate() {
        // A refusal of these leaves what they should have taken away.
        if ["aclDestroy", "aclmdlRIDestroy"].iter().any(|prefix| symbol.starts_with(prefix)) {
            continue;
        }
        // Each function in turn, those of graphs in every way.
        let ways = if symbol.starts_with("aclmdlRI") { 3 } else { 1 };
        for way in turn..turn + ways {
            let (n, code) = [(1, 561002), (count.div_ceil(2), 507015), (count, 507899)][way % 3];
            let (result, _) = run(Some(format!("{symbol}:{n}:{code}")));
            let fits = match (&result, describe(code).1) {
                (Ok(logits), _) => *logits == sound,
                (Err(DeviceError::Lost { .. }), Class::Lost) => true,
                (Err(DeviceError::Poisoned { .. }), Class::Poisoned) => true,
                // What makes an object gives null, and no code.
                (Err(DeviceError::Execution { .. }), class) => !class.is_final() || symbol.starts_with("aclCreate"),
                _ => false,
            };
            assert!(fits, "{symbol} {n} gives {code}: {:?}", result.map(|_| "other numbers"));
            (failed, all) = (failed + usize::from(result.is_err()), all + 1);
        }
    }
    assert!(all > 25 && failed > all / 2, "{failed} of {all}");
}

#[test]
fn there_are_no_graphs_where_there_is_a_reason() {
    let simulator = Simulator::new();
    simulator.control(&format!("soc={P310}"));
    let small = AscendBackend::new(&AscendOptions { fused: true, ..options(DType::F16) }).unwrap();
    assert!(small.forms().pop().unwrap().contains("310P is not known to have them"));
    drop(small);
    simulator.control(&format!("soc={A2}"));
    for (fused, blocking, reason) in
        [(false, false, "fused forms are off"), (true, true, "every operator is waited for")]
    {
        let backend = AscendBackend::new(&AscendOptions { fused, blocking, ..options(DType::BF16) }).unwrap();
        let mut decoder = Decoder::new(&backend);
        decoder.step(SEQUENCES, 0, PROMPT, None).unwrap();
        decoder.decode(SEQUENCES, PROMPT..PROMPT + 4);
        assert!(backend.forms().pop().unwrap().contains(reason));
        assert!(calls(&simulator).keys().all(|name| !name.starts_with("aclmdlRI")));
    }
    simulator.expect_clean();
}
