//! What the host's processors are, told without starting a thread.

use std::collections::BTreeMap;

use baton_device::DeviceFacts;

use crate::isa::Isa;
use crate::topology::Topology;

/// The processors that this process may use. Their memory is the host's, which others know better.
pub fn probe() -> DeviceFacts {
    let topology = Topology::detect();
    let cores: usize = (0..topology.nodes()).map(|node| topology.cpus(node).len()).sum();
    let sets = Isa::available().iter().map(Isa::to_string).collect::<Vec<_>>().join(", ");
    let details =
        [("cores", cores.to_string()), ("memory nodes", topology.nodes().to_string()), ("instruction sets", sets)];
    DeviceFacts {
        device: "cpu".into(),
        chip: std::fs::read_to_string("/proc/cpuinfo").ok().as_deref().and_then(model_name),
        count: 1,
        details: details.map(|(name, value)| (name.to_owned(), value)).into_iter().collect::<BTreeMap<_, _>>(),
        ..DeviceFacts::default()
    }
}

/// x86-64 alone tells a name.
fn model_name(cpuinfo: &str) -> Option<String> {
    let line = cpuinfo.lines().find_map(|line| line.strip_prefix("model name"))?;
    Some(line.trim_start().strip_prefix(':')?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_can_serve_and_says_with_what() {
        let facts = probe();
        assert!(facts.missing.is_empty() && facts.count == 1, "{facts:?}");
        assert!(facts.details["instruction sets"].starts_with("portable"), "{facts:?}");
        assert!(facts.details["cores"].parse::<usize>().unwrap() >= 1, "{facts:?}");
    }

    #[test]
    fn a_processor_is_named_if_it_tells_its_name() {
        assert_eq!(model_name("processor\t: 0\nmodel name\t: A B @ 2 GHz\n").as_deref(), Some("A B @ 2 GHz"));
        assert_eq!(model_name("processor\t: 0\nBogoMIPS\t: 200.00\n"), None);
    }
}
