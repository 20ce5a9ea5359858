//! The gate of one generation: golden cases replayed on the engine that serves it, before it is admitted and ever after.
//!
//! Both use idle steps only, so they delay nobody; where the policy requires proof, nobody is served before, and all steps
//! are idle. What was computed at the gate is the canary's measure: where rows do not depend on each other, every later
//! replay gives the same bits, or memory or driver have changed under it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use baton_device::Caps;
use baton_engine::EngineHandle;
use baton_handoff::{
    CheckName, DeviceFacts, Numerics, Outcome, Parity, Report, Verdict, check_vocabulary, replay_case, replay_cases,
    text_parity,
};
use baton_http::{Admission, HandoffState};
use baton_model::LoadReport;
use baton_text::TextModel;
use tokio::{task::spawn_blocking, time::sleep};
use tracing::{error, info, warn};

use super::{Checked, Handed, check_compatibility, column, ends, facts, listed, replay::IdleReplay};
use crate::settings::{HandoffPolicy, Settings};

/// What is to be proven, and where it is proven.
pub struct Gate {
    policy: HandoffPolicy,
    interval: Duration,
    bundle: Option<Bundle>,
    engine: EngineHandle,
    text: Arc<TextModel>,
    state: HandoffState,
    parity: Option<baton_http::Parity>,
}

struct Bundle {
    checked: Box<Checked>,
    replay: IdleReplay,
    caps: Caps,
    facts: DeviceFacts,
    /// What the device computed at the gate, by case.
    proven: Vec<Outcome>,
}

impl Gate {
    /// The gate of a generation: what came with its checkpoint, what the device is, and the engine that runs it.
    pub fn new(
        handed: Handed,
        settings: &Settings,
        (caps, report): (Caps, &LoadReport),
        engine: EngineHandle,
        text: Arc<TextModel>,
    ) -> Self {
        let required = settings.handoff == HandoffPolicy::Require;
        let (admission, bundle) = match handed {
            Handed::Off => (Admission::Off, None),
            Handed::Absent => (Admission::Absent, None),
            Handed::Bundle(checked) => {
                let replay = IdleReplay::new(engine.clone(), ends(report, &text));
                let facts = facts(report, &caps, &checked.manifest);
                (Admission::Pending, Some(Bundle { checked, replay, caps, facts, proven: Vec::new() }))
            }
        };
        let state = HandoffState::new(admission, required);
        let (policy, interval) = (settings.handoff, settings.canary_interval);
        Self { policy, interval, bundle, engine, text, state, parity: None }
    }

    /// What the service shows and heeds.
    pub fn state(&self) -> HandoffState {
        self.state.clone()
    }

    /// What was measured, once it was.
    pub fn parity(&self) -> Option<baton_http::Parity> {
        self.parity
    }

    /// Runs all checks and admits the generation, or says why not.
    pub async fn prove(self) -> Self {
        let state = self.state.clone();
        match spawn_blocking(move || self.judge()).await {
            Ok(gate) => gate,
            Err(panicked) => {
                state.set_admission(Admission::Failed { reason: "the gate failed internally".into() });
                std::panic::resume_unwind(panicked.into_panic())
            }
        }
    }

    /// As [`prove`](Self::prove), on a thread that may block.
    pub fn judge(mut self) -> Self {
        let Some(bundle) = &mut self.bundle else {
            if self.policy == HandoffPolicy::Warn {
                warn!("there is no handoff.json: nothing proves that this device computes what was trained");
            }
            return self;
        };
        let started = Instant::now();
        let before = self.engine.stats().rebuilds;
        let judged = bundle.judge(&self.engine, &self.text).or_else(|error| match self.engine.stats() {
            // The device failed meanwhile, and the model is loaded again.
            stats if stats.rebuilding || stats.rebuilds > before => bundle.judge(&self.engine, &self.text),
            _ => Err(error),
        });
        let admission = match judged {
            // Whoever shut it down has no use for it any more.
            Err(_) if !self.engine.stats().alive => return self,
            Err(error) => Admission::Failed { reason: format!("{error:#}") },
            Ok((report, parity)) => {
                self.parity = parity;
                parity.into_iter().for_each(|parity| self.state.set_parity(parity));
                self.state.set_report(serde_json::to_vec_pretty(&report).expect("a report is JSON"));
                match report.verdict() {
                    Verdict::Pass => Admission::Passed,
                    _ => Admission::Failed { reason: listed(&report.reasons()) },
                }
            }
        };
        let (cases, seconds) = (bundle.proven.len(), format!("{:.2}", started.elapsed().as_secs_f64()));
        match &admission {
            Admission::Failed { reason } => error!(reason, cases, seconds, "the hand-off is not borne out"),
            _ => info!(cases, seconds, "the hand-off is proven"),
        }
        self.state.set_admission(admission);
        self
    }

    /// Replays a case at a time, until the engine ends.
    pub async fn watch(self) {
        let Some(mut bundle) = self.bundle.filter(|bundle| !bundle.proven.is_empty() && !self.interval.is_zero())
        else {
            return;
        };
        let mut next = 0;
        loop {
            tokio::select! {
                () = self.engine.drained() => return,
                () = sleep(self.interval) => {}
            }
            let context = context(&self.engine);
            let replayed = spawn_blocking(move || (bundle.drift(next, context), bundle)).await;
            let Ok((drift, back)) = replayed else {
                return error!("a replay panicked; no more golden cases are replayed");
            };
            bundle = back;
            next = (next + 1) % bundle.proven.len();
            // An engine that is down, or too busy, proves nothing.
            let Ok(drift) = drift else { continue };
            self.state.canary_run(drift.is_some());
            if let Some(reason) = drift {
                error!(reason, "the device no longer computes what it computed at the gate");
                self.state.set_admission(Admission::Failed { reason });
            }
        }
    }
}

/// Ids of the longest case: one token is always generated behind it.
fn context(engine: &EngineHandle) -> usize {
    let spec = engine.spec();
    spec.max_model_len.min(spec.num_blocks * spec.block_size) - 1
}

impl Bundle {
    fn judge(&mut self, engine: &EngineHandle, text: &TextModel) -> Result<(Report, Option<baton_http::Parity>)> {
        let Self { checked, replay, caps, facts, proven } = self;
        let manifest = &checked.manifest;
        let mut report = checked.report();
        check_compatibility(&mut report, manifest, caps);
        text_parity(&manifest.cases, text, chrono::Local::now().naive_local()).enter(&mut report);
        if let Err(reasons) = check_vocabulary(&manifest.cases, engine.spec().vocab_size) {
            report.check(CheckName::Numerics, Err(reasons));
            return Ok((report, None));
        }
        *proven = replay_cases(&manifest.cases, context(engine), replay, &mut |_, _| true)?;
        let column = column(manifest, facts, &Parity::of(&manifest.cases, proven));
        let Numerics { max_abs_logprob_diff, kl, top1, .. } = &column.numerics;
        let (max_abs_logprob_diff, kl) = (*max_abs_logprob_diff, *kl);
        let parity =
            top1.agreement().map(|top1_agreement| baton_http::Parity { max_abs_logprob_diff, kl, top1_agreement });
        report.add_device(column);
        Ok((report, parity))
    }

    /// How a case differs now from what was proven, if it does more than it may.
    fn drift(&mut self, index: usize, context: usize) -> Result<Option<String>> {
        let manifest = &self.checked.manifest;
        let case = &manifest.cases[index];
        let now = replay_case(case, context, &mut self.replay)?;
        if now == self.proven[index] {
            return Ok(None);
        }
        if self.caps.row_invariant {
            return Ok(Some(format!("case {:?} gives other bits than at the gate", case.name)));
        }
        let parity = Parity::of(std::slice::from_ref(case), std::slice::from_ref(&now));
        let findings = column(manifest, &self.facts, &parity).findings;
        let failed: Vec<String> =
            findings.iter().filter(|f| f.verdict == Verdict::Fail).map(ToString::to_string).collect();
        Ok((!failed.is_empty()).then(|| format!("case {:?}: {}", case.name, failed.join("; "))))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use baton_engine::EngineConfig;
    use baton_model::{Files, RunError, RunSpec, Runner, StepOutput, StepPlan};

    use super::*;
    use crate::{
        bundled,
        load::{self, Parts},
        settings::ServeArgs,
    };

    /// A device whose memory goes bad when it is told to.
    struct Drifting {
        runner: Box<dyn Runner>,
        bad: Arc<AtomicBool>,
    }

    impl Runner for Drifting {
        fn spec(&self) -> &RunSpec {
            self.runner.spec()
        }

        fn begin(&mut self, plan: &StepPlan) -> Result<(), RunError> {
            self.runner.begin(plan)
        }

        fn finish(&mut self) -> Result<StepOutput, RunError> {
            let mut output = self.runner.finish()?;
            if self.bad.load(Ordering::Relaxed) {
                let scores = output.sequences.iter_mut().filter_map(|sequence| sequence.scores.as_mut().ok());
                scores.flatten().flat_map(|score| &mut score.logprobs).for_each(|logprob| *logprob += 1e-6);
            }
            Ok(output)
        }

        fn clear_blocks(&mut self, kept: &[u32], passing: &[u32]) -> Result<(), RunError> {
            self.runner.clear_blocks(kept, passing)
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_device_that_no_longer_gives_the_same_bits_is_taken_out_of_service() {
        let args = ServeArgs { handoff: Some(HandoffPolicy::Require), ..ServeArgs::default() };
        let settings = Settings { canary_interval: Duration::from_millis(1), ..args.resolve().unwrap() };
        let files = Files::Embedded(bundled::FILES);
        let handed = Handed::open(&files, &settings).unwrap();
        let Parts { text, loaded, .. } = load::parts(&files, &settings, None).unwrap();
        let bad = Arc::new(AtomicBool::new(false));
        let runner = Box::new(Drifting { runner: loaded.runner, bad: bad.clone() });
        let (engine, thread) = baton_engine::spawn(runner, EngineConfig::default());

        let device = (loaded.caps, &loaded.report);
        let gate = Gate::new(handed, &settings, device, engine.clone(), Arc::new(text)).prove().await;
        let state = gate.state();
        assert_eq!(state.admission(), Admission::Passed);
        let watching = tokio::spawn(gate.watch());
        sleep(Duration::from_millis(200)).await;
        assert_eq!(state.admission(), Admission::Passed, "the same bits as long as nothing happens");
        bad.store(true, Ordering::Relaxed);
        while state.admission() == Admission::Passed {
            sleep(Duration::from_millis(5)).await;
        }
        let Admission::Failed { reason } = state.admission() else { panic!("{:?}", state.admission()) };
        assert!(reason.contains("other bits"), "{reason}");
        engine.shutdown();
        watching.await.unwrap();
        thread.join();
    }
}
