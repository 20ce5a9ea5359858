//! What the simulator is told to be and to do wrong, by environment at the start and by `cuda_sim_control` later.
//!
//! Invariant: both have one grammar: the variable `CUDA_SIM_KEY` with `value` is `cuda_sim_control("key=value")`. The keys are documented at
//! the head of the crate.

use std::{
    ffi::{CStr, c_char},
    path::PathBuf,
};

use crate::machine::{Fail, fail, lock, notify};

/// What can be set.
#[derive(Clone)]
pub struct Settings {
    pub devices: u32,
    /// Compute capability, ten times the major number plus the minor.
    pub cc: u32,
    /// Multiprocessors of each device.
    pub sms: u32,
    /// Bytes of memory that each device has.
    pub memory: u64,
    /// As `cuDriverGetVersion` gives it.
    pub driver: i32,
    /// Of a block's threads: 0 forward, 1 reverse, else the seed of a shuffle.
    pub order: u64,
    /// No task of any stream comes to an end.
    pub hang: bool,
    /// What every call returns once the device is gone.
    pub lost: Option<i32>,
    /// Whether a reset of the device's context ends a sticky error.
    pub reset: bool,
    /// Where the report is written.
    pub report: Option<PathBuf>,
    faults: Vec<Fault>,
}

/// Something that happens at the n-th call of a symbol from now.
#[derive(Clone)]
struct Fault {
    symbol: String,
    calls: u64,
    effect: Effect,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// The call returns the code.
    Code(i32),
    /// The call succeeds, and its task fails with the code when it runs.
    Run(i32),
    /// The call succeeds, and from then on nothing comes to an end.
    Hang,
}

const KEYS: [&str; 11] =
    ["devices", "cc", "sms", "memory", "driver", "order", "hang", "lost", "reset", "report", "fault"];

impl Settings {
    /// Of the variables `CUDA_SIM_*`. One that cannot be read ends the process: a test that sets it means it.
    pub fn from_environment() -> Self {
        let mut settings = Self {
            devices: 1,
            cc: 90,
            sms: 132,
            memory: 2 << 30,
            driver: 13000,
            order: 0,
            hang: false,
            lost: None,
            reset: true,
            report: None,
            faults: Vec::new(),
        };
        for key in KEYS {
            let name = format!("CUDA_SIM_{}", key.to_uppercase());
            if let Ok(value) = std::env::var(&name) {
                settings.set(key, &value).unwrap_or_else(|accepted| panic!("{name}={value}: {accepted}"));
            }
        }
        settings
    }

    /// Sets one key; the error says what would have been accepted.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        match key {
            "devices" => self.devices = number(value)?,
            "cc" => self.cc = number(value)?,
            "sms" => self.sms = number(value)?,
            "memory" => self.memory = number(value)?,
            "driver" => self.driver = number(value)?,
            "order" => {
                self.order = match value {
                    "forward" => 0,
                    "reverse" => 1,
                    seed => number::<u64>(seed)?.saturating_add(2),
                }
            }
            "hang" => self.hang = switch(value)?,
            "lost" => self.lost = Some(number(value)?).filter(|&code| code != 0),
            "reset" => self.reset = switch(value)?,
            "report" => self.report = Some(value.into()),
            "fault" if value.is_empty() => self.faults.clear(),
            "fault" => {
                for one in value.split(',') {
                    self.faults.push(one.parse()?);
                }
            }
            _ => return Err(format!("a key of {}", KEYS.join(", "))),
        }
        Ok(())
    }

    /// Counts a call of the symbol, and gives what was injected into it. A code to be returned is an error.
    pub fn injected(&mut self, symbol: &str) -> Result<Option<Effect>, Fail> {
        let mut due = None;
        self.faults.retain_mut(|fault| {
            if fault.symbol != symbol {
                return true;
            }
            fault.calls = fault.calls.saturating_sub(1);
            due = due.or((fault.calls == 0).then_some(fault.effect));
            fault.calls > 0
        });
        match due {
            Some(Effect::Code(code)) => return Err(fail!(code, "a fault that was asked for")),
            Some(Effect::Hang) => self.hang = true,
            _ => {}
        }
        Ok(due)
    }
}

impl std::str::FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.split(':').collect();
        let (symbol, calls, effect) = match parts[..] {
            [symbol, calls, "hang"] => (symbol, calls, Effect::Hang),
            [symbol, calls, "run", code] => (symbol, calls, Effect::Run(number(code)?)),
            [symbol, calls, code] => (symbol, calls, Effect::Code(number(code)?)),
            _ => return Err("SYMBOL:N:CODE, SYMBOL:N:run:CODE or SYMBOL:N:hang".to_owned()),
        };
        Ok(Self { symbol: symbol.to_owned(), calls: number(calls)?, effect })
    }
}

fn number<T: std::str::FromStr>(value: &str) -> Result<T, String> {
    value.parse().map_err(|_| format!("a number in place of {value:?}"))
}

fn switch(value: &str) -> Result<bool, String> {
    match value {
        "on" | "1" => Ok(true),
        "off" | "0" => Ok(false),
        _ => Err("on or off".to_owned()),
    }
}

/// Sets what `text` says, `key=value`; `default` sets every key as at the start. Returns 0, or 1 with a message.
///
/// # Safety
/// `text` ends in zero.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuda_sim_control(text: *const c_char) -> i32 {
    // SAFETY: as the caller promises.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    let mut m = lock();
    let set = match text.split_once('=') {
        Some((key, value)) => m.settings.set(key, value),
        None if text == "default" => {
            m.settings = Settings { report: m.settings.report.take(), ..Settings::from_environment() };
            Ok(())
        }
        None => Err("key=value".to_owned()),
    };
    notify();
    match set {
        Ok(()) => 0,
        Err(accepted) => {
            m.counters.messages.push(format!("cuda_sim_control {text}: accepted is {accepted}"));
            1
        }
    }
}
