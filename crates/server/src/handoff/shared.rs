use std::sync::Arc;
use parking_lot::Mutex;
use baton_model::{RunError, RunSpec, Runner, StepOutput, StepPlan};
pub struct SharedRunner { inner: Arc<Mutex<Box<dyn Runner>>>, spec: RunSpec }
impl SharedRunner {
    pub fn new(runner: Box<dyn Runner>) -> Self { let spec = runner.spec().clone(); Self { inner: Arc::new(Mutex::new(runner)), spec } }
    pub fn spec(&self) -> &RunSpec { &self.spec }
    pub fn view(&self, steps: usize, blocks: usize) -> Box<dyn Runner> {
        let mut spec = self.spec.clone(); spec.max_step_tokens = steps; spec.num_blocks = blocks; spec.max_step_sequences = spec.max_step_sequences.min(steps);
        Box::new(View { inner: self.inner.clone(), spec })
    }
}
struct View { inner: Arc<Mutex<Box<dyn Runner>>>, spec: RunSpec }
impl Runner for View {
    fn spec(&self) -> &RunSpec { &self.spec }
    fn step(&mut self, plan: &StepPlan) -> Result<StepOutput, RunError> { self.inner.lock().step(plan) }
    fn clear_blocks(&mut self, b: &[u32]) -> Result<(), RunError> { self.inner.lock().clear_blocks(b) }
}
