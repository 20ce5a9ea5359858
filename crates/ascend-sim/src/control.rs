//! What the simulator is told to be and to do wrong, by environment at the start and by `ascend_sim_control` later.
//!
//! Invariant: both have one grammar: the variable `ASCEND_SIM_KEY` with `value` is `ascend_sim_control("key=value")`. The keys are
//! documented at the head of the crate.

use std::{
    collections::BTreeMap,
    ffi::{CStr, c_char},
    path::PathBuf,
    time::{Duration, SystemTime},
};

use crate::{
    array::{Chip, Refusal},
    constants::*,
    machine::{answer, lock, notify, refusal},
};

/// What can be set.
pub struct Settings {
    /// As `aclrtGetSocName` gives it. Texts live as long as the process, because callers keep pointers to them.
    pub soc: &'static CStr,
    pub version: &'static CStr,
    pub devices: u32,
    /// Bytes of memory that each device has.
    pub memory: u64,
    /// Whether the library is one of those that are made for linking only.
    pub stub: bool,
    /// Whether sums are taken in an order that depends on the size of the batch.
    pub perturb: bool,
    /// What each queued copy takes.
    pub slow: Duration,
    /// No task of any stream comes to an end.
    pub hang: bool,
    /// What every call returns once the device is gone.
    lost: Option<i32>,
    /// How long a collective waits for the other ranks.
    pub collective_timeout: Duration,
    /// Where the report is written when a device is closed.
    pub report: Option<PathBuf>,
    /// A file of lines `key=value`, applied whenever it changes, and what it was when it was read last.
    control: Option<(PathBuf, Option<(SystemTime, u64)>)>,
    /// What phase 1 of an operator returns.
    refused: BTreeMap<String, i32>,
    faults: Vec<Injected>,
}

/// Something that happens at the n-th call of a symbol from now.
struct Injected {
    symbol: String,
    calls: u64,
    effect: Effect,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// The call returns the code.
    Code(i32),
    /// The call succeeds, and its task fails when it runs.
    Run,
    /// The call succeeds, and from then on nothing comes to an end.
    Hang,
    /// The first value of the operator's first output is not a number.
    Nan,
}

const KEYS: [&str; 15] = [
    "soc",
    "version",
    "devices",
    "memory",
    "stub",
    "perturb",
    "slow",
    "hang",
    "lost",
    "collective_timeout",
    "refuse",
    "fault",
    "nan",
    "report",
    "control",
];

impl Settings {
    /// Of the variables `ASCEND_SIM_*`. One that cannot be read ends the process: a test that sets it means it.
    pub fn from_environment() -> Self {
        let mut settings = Self {
            soc: c"Ascend910B3",
            version: c"8.5.0",
            devices: 1,
            memory: 2 << 30,
            stub: false,
            perturb: false,
            slow: Duration::ZERO,
            hang: false,
            lost: None,
            collective_timeout: Duration::from_secs(60),
            report: None,
            control: None,
            refused: BTreeMap::new(),
            faults: Vec::new(),
        };
        for key in KEYS {
            let name = format!("ASCEND_SIM_{}", key.to_uppercase());
            if let Ok(value) = std::env::var(&name) {
                settings.set(key, &value).unwrap_or_else(|accepted| panic!("{name}={value}: {accepted}"));
            }
        }
        settings
    }

    /// Sets one key; the error says what would have been accepted.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        match key {
            "soc" => self.soc = text(value)?,
            "version" => self.version = text(value)?,
            "devices" => self.devices = number(value)?,
            "memory" => self.memory = number(value)?,
            "stub" => self.stub = switch(value)?,
            "perturb" => self.perturb = switch(value)?,
            "slow" => self.slow = Duration::from_millis(number(value)?),
            "hang" => self.hang = switch(value)?,
            "lost" => self.lost = Some(number(value)?).filter(|&code| code != 0),
            "collective_timeout" => self.collective_timeout = Duration::from_millis(number(value)?),
            "refuse" => {
                let (operator, code) = value.split_once(':').ok_or("OPERATOR:CODE, code 0 to accept again")?;
                self.refused.insert(operator.to_owned(), number(code)?);
            }
            "fault" if value.is_empty() => self.faults.clear(),
            "fault" => value.split(',').try_for_each(|one| self.inject(one))?,
            "nan" => {
                let (symbol, calls) = value.split_once(':').unwrap_or((value, "1"));
                self.faults.push(Injected { symbol: symbol.to_owned(), calls: number(calls)?, effect: Effect::Nan });
            }
            "report" => self.report = Some(value.into()),
            "control" => self.control = Some((value.into(), None)),
            _ => return Err(format!("a key of {}", KEYS.join(", "))),
        }
        Ok(())
    }

    /// How often the file of settings is looked at while somebody waits; never, if there is none.
    pub fn control_interval(&self) -> Option<Duration> {
        self.control.as_ref().map(|_| Duration::from_millis(20))
    }

    /// Applies the file of settings if it has changed; the lines that could not be.
    pub fn read_control(&mut self) -> Vec<String> {
        let Some((path, last)) = &mut self.control else { return Vec::new() };
        let now = std::fs::metadata(&*path).ok().and_then(|m| Some((m.modified().ok()?, m.len())));
        if now.is_none() || *last == now {
            return Vec::new();
        }
        *last = now;
        let lines = std::fs::read_to_string(path).unwrap_or_default();
        let apply = |line: &str| match line.split_once('=') {
            Some((key, value)) => self.set(key, value).err().map(|accepted| format!("{line}: accepted is {accepted}")),
            None => Some(format!("{line}: accepted is key=value")),
        };
        lines.lines().filter(|line| !line.is_empty()).filter_map(apply).collect()
    }

    fn inject(&mut self, value: &str) -> Result<(), String> {
        let mut parts = value.split(':');
        let (Some(symbol), Some(calls), Some(effect), None) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err("SYMBOL:N:CODE, SYMBOL:N:run or SYMBOL:N:hang".to_owned());
        };
        let effect = match effect {
            "run" => Effect::Run,
            "hang" => Effect::Hang,
            code => Effect::Code(number(code)?),
        };
        self.faults.push(Injected { symbol: symbol.to_owned(), calls: number(calls)?, effect });
        Ok(())
    }

    pub fn chip(&self) -> Chip {
        match self.soc.to_bytes() {
            s if s.starts_with(b"Ascend310P") => Chip::P310,
            s if s.starts_with(b"Ascend910_93") => Chip::A3,
            _ => Chip::A2,
        }
    }

    /// Counts a call of the symbol, and gives what was injected into it. A refusal is returned as one.
    pub fn injected(&mut self, symbol: &str) -> Result<Option<Effect>, Refusal> {
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
            Some(Effect::Code(code)) => Err(refusal!(code, "a fault that was asked for")),
            Some(Effect::Hang) => {
                self.hang = true;
                Ok(due)
            }
            _ => Ok(due),
        }
    }

    /// Refused once the device is lost.
    pub fn reachable(&self) -> Result<(), Refusal> {
        self.lost.map_or(Ok(()), |code| Err(refusal!(code, "the device is lost")))
    }

    /// What phase 1 of an operator is to refuse.
    pub fn accepts(&self, operator: &str) -> Result<(), Refusal> {
        match self.refused.get(operator) {
            Some(&code) if code != 0 => Err(refusal!(code, "a refusal that was asked for")),
            _ => Ok(()),
        }
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

/// A text for C. At most 127 bytes: callers give room for 128.
fn text(value: &str) -> Result<&'static CStr, String> {
    let text = std::ffi::CString::new(value).ok().filter(|_| value.len() < 128);
    Ok(Box::leak(text.ok_or("at most 127 bytes, none of them zero")?.into_boxed_c_str()))
}

/// Sets what `text` says, `key=value`. Returns 0, or 100000 with a message for `aclGetRecentErrMsg`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ascend_sim_control(text: *const c_char) -> i32 {
    // SAFETY: callers give a string that ends in zero.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    let set = match text.split_once('=') {
        Some((key, value)) => lock().settings.set(key, value),
        None => Err("key=value".to_owned()),
    };
    notify();
    let refused = |accepted| refusal!(ACL_ERROR_INVALID_PARAM, "{text}: accepted is {accepted}");
    answer("ascend_sim_control", set.map_err(refused))
}
