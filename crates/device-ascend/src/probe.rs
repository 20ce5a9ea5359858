//! What this machine offers, for whoever looks before anything is loaded. Nothing here fails or waits for ever: what is not
//! there is a reason in the list.

use std::collections::BTreeMap;
use std::ffi::c_char;
use std::sync::mpsc;
use std::time::Duration;

use baton_device::{DeviceFacts, DeviceMemory, LibraryFacts};

use crate::abi::consts::{cann_attr, mem_attr};
use crate::chip::Chip;
use crate::device::check;
use crate::installation::{self, Unusable};
use crate::libraries::{Acl, Attempt, Role, Search};

/// The longest that the driver may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// Written by the driver's installer.
const DRIVER_VERSION: &str = "/usr/local/Ascend/driver/version.info";

/// What there is of a device.
pub fn probe(search: &Search, device: u32) -> DeviceFacts {
    let name = format!("ascend:{device}");
    let (tell, told) = mpsc::channel();
    let search = search.clone();
    let found = DeviceFacts { device: name.clone(), versions: driver_version(), ..DeviceFacts::default() };
    // On a thread of its own: a driver may hang, and a device stays current on the thread that asked for it.
    let look = move || _ = tell.send(look(&search, device, found));
    match std::thread::Builder::new().name(name.clone()).spawn(look).map(|_| told.recv_timeout(PATIENCE)) {
        Ok(Ok(facts)) => facts,
        _ => DeviceFacts {
            device: name,
            versions: driver_version(),
            missing: vec![format!("the driver does not answer within {} s", PATIENCE.as_secs())],
            ..DeviceFacts::default()
        },
    }
}

fn look(search: &Search, device: u32, mut facts: DeviceFacts) -> DeviceFacts {
    let acl = match installation::libraries(search) {
        Ok(acl) => acl,
        Err(unusable) => {
            if let Unusable::Libraries(unavailable) = &unusable {
                facts.libraries = libraries(&unavailable.attempts);
            }
            facts.missing.push(unusable.to_string());
            return facts;
        }
    };
    facts.libraries = libraries(&acl.attempts);
    facts.symbols = acl.symbols.iter().map(|(name, there)| ((*name).to_owned(), *there)).collect();
    facts.versions.extend(versions(acl));
    match installation::devices(acl) {
        Ok((count, soc)) => {
            facts.count = count as usize;
            let unusable = match Chip::from_soc_name(&soc) {
                _ if device >= count => Some(Unusable::Devices { count }),
                None => Some(Unusable::Chip { soc: soc.clone() }),
                Some(chip) => {
                    facts.details.insert("family".into(), chip.to_string());
                    None
                }
            };
            facts.chip = (!soc.is_empty()).then_some(soc);
            facts.missing.extend(unusable.map(|unusable| unusable.to_string()));
        }
        Err(unusable) => facts.missing.push(unusable.to_string()),
    }
    if (device as usize) < facts.count {
        match memory(acl, device) {
            Ok(memory) => facts.memory = Some(memory),
            Err(reason) => facts.missing.push(reason),
        }
        facts.details.extend(attributes(acl));
    }
    facts
}

fn libraries(attempts: &[Attempt]) -> Vec<LibraryFacts> {
    [Role::Runtime, Role::Meta, Role::Operators, Role::Collectives]
        .into_iter()
        .map(|role| {
            let mut facts = LibraryFacts { role: role.to_string(), ..LibraryFacts::default() };
            for Attempt { place, problem, .. } in attempts.iter().filter(|attempt| attempt.role == role) {
                let place = place.display().to_string();
                match problem {
                    None => facts.opened.push(place),
                    Some(problem) => facts.tried.push((place, problem.clone())),
                }
            }
            facts
        })
        .collect()
}

fn driver_version() -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(DRIVER_VERSION).unwrap_or_default();
    let version = text.lines().find_map(|line| line.strip_prefix("Version="));
    version.map(|version| ("driver".to_owned(), version.trim().to_owned())).into_iter().collect()
}

/// The versions that the runtime tells.
fn versions(acl: &Acl) -> BTreeMap<String, String> {
    let mut versions = BTreeMap::new();
    if let Some(version) = acl.runtime.version {
        let (mut major, mut minor, mut patch) = (0, 0, 0);
        // SAFETY: valid out pointers.
        if unsafe { version(&raw mut major, &raw mut minor, &raw mut patch) } == 0 {
            versions.insert("acl".into(), format!("{major}.{minor}.{patch}"));
        }
    }
    if let Some(version) = acl.runtime.package_version {
        let (mut name, mut text) = (*b"runtime\0", [0u8; 1024]);
        // SAFETY: the name ends in zero. That the text's buffer is large enough, and the name is one that it knows:
        // UNCONFIRMED.
        let code = unsafe { version(name.as_mut_ptr().cast::<c_char>(), text.as_mut_ptr().cast::<c_char>()) };
        let text = String::from_utf8_lossy(text.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned();
        if code == 0 && !text.is_empty() {
            versions.insert("runtime".into(), text);
        }
    }
    versions
}

/// Makes the device current on this thread for a moment.
fn memory(acl: &Acl, device: u32) -> Result<DeviceMemory, String> {
    let (mut free, mut total) = (0, 0);
    // SAFETY: valid out pointers; the thread lets the device go again.
    unsafe {
        check(acl, "aclrtSetDevice", (acl.runtime.set_device)(device as i32)).map_err(|error| error.to_string())?;
        let code = (acl.runtime.mem_info)(mem_attr::HBM, &raw mut free, &raw mut total);
        let result = check(acl, "aclrtGetMemInfo", code);
        (acl.runtime.reset_device)(device as i32);
        result.map_err(|error| error.to_string())?;
    }
    Ok(DeviceMemory { total: total as u64, free: free as u64 })
}

/// What decides about forms, as the runtime tells it.
fn attributes(acl: &Acl) -> BTreeMap<String, String> {
    let mut attributes = BTreeMap::new();
    for (attribute, name) in [(cann_attr::BF16, "bf16"), (cann_attr::INF_NAN, "infinities")] {
        let mut value = 0;
        // SAFETY: a valid out pointer.
        if unsafe { (acl.runtime.cann_attribute)(attribute, &raw mut value) } == 0 {
            attributes.insert(name.into(), if value == 1 { "yes" } else { "no" }.into());
        }
    }
    attributes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_cann_says_what_was_looked_for() {
        let folder = std::env::temp_dir().join("baton-no-such-folder");
        let facts = probe(&Search { folder: Some(folder) }, 0);
        assert_eq!((facts.device.as_str(), facts.count, facts.missing.len()), ("ascend:0", 0, 1));
        let runtime = facts.libraries.iter().find(|library| library.role == "runtime").expect("the role");
        assert_eq!((runtime.opened.len(), runtime.tried.len()), (0, 2));
    }
}
