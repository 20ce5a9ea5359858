//! Memory nodes of the machine (NUMA): which CPUs are near which memory, and which part of a region each node takes.
//!
//! Memory goes to the node whose CPU first touches it. Weights are packed by regions whose tasks are panels, products
//! run by regions whose tasks are ranges of panels, and both give a node the same share of the tasks: so a node
//! mostly reads what lies in its own memory, with nothing said anywhere about where memory is.

use std::ops::Range;

use crate::affinity;

/// The CPUs of each node that this process may use. At least one node; CPUs are left out if they are not known.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Topology {
    nodes: Vec<Vec<usize>>,
}

impl Topology {
    /// As the system tells it.
    pub(crate) fn detect() -> Self {
        let read =
            |file: String| std::fs::read_to_string(format!("/sys/devices/system/node/{file}")).unwrap_or_default();
        let online = read("online".to_owned());
        // No kernel is built for more nodes.
        let nodes = (0..1024).filter(|&node| names(&online, node));
        let lists: Vec<String> = nodes.map(|node| read(format!("node{node}/cpulist"))).collect();
        Self::new(&affinity::allowed(), &lists)
    }

    /// Nodes with the CPUs that their lists name, of those allowed. One node if fewer than two of them have any.
    pub(crate) fn new(allowed: &[usize], lists: &[impl AsRef<str>]) -> Self {
        let of = |list: &str| allowed.iter().copied().filter(|&cpu| names(list, cpu)).collect::<Vec<_>>();
        let mut nodes: Vec<_> = lists.iter().map(|list| of(list.as_ref())).collect();
        nodes.retain(|cpus| !cpus.is_empty());
        if nodes.len() < 2 {
            nodes = vec![allowed.to_vec()];
        }
        Self { nodes }
    }

    pub(crate) fn nodes(&self) -> usize {
        self.nodes.len()
    }

    pub(crate) fn cpus(&self, node: usize) -> &[usize] {
        &self.nodes[node]
    }

    /// The node that a CPU belongs to, the first if none.
    pub(crate) fn node_of(&self, cpu: usize) -> usize {
        match &self.nodes[..] {
            [_] => 0,
            nodes => nodes.iter().position(|cpus| cpus.contains(&cpu)).unwrap_or(0),
        }
    }

    /// The node of each thread, in ascending order: as many on each as its share of the CPUs says.
    pub(crate) fn homes(&self, threads: usize) -> Vec<usize> {
        let all: usize = self.nodes.iter().map(Vec::len).sum();
        let mut homes = Vec::with_capacity(threads);
        let mut before = 0;
        for (node, cpus) in self.nodes.iter().enumerate() {
            before += cpus.len();
            let end = if node + 1 == self.nodes() { threads } else { threads * before / all };
            homes.resize(end, node);
        }
        homes
    }
}

/// The tasks of a node, where `ends` are the threads of all nodes up to each: its threads' share.
pub(crate) fn share(ends: &[usize], tasks: usize, node: usize) -> Range<usize> {
    let [.., threads] = ends else { return 0..0 };
    if ends.len() == 1 {
        return 0..tasks;
    }
    let end = |node: usize| tasks * ends[node] / threads;
    if node == 0 { 0..end(0) } else { end(node - 1)..end(node) }
}

/// Whether a list like `0-3,8` names a CPU or node.
fn names(list: &str, number: usize) -> bool {
    list.trim().split(',').any(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        matches!((first.parse(), last.parse()), (Ok(first), Ok(last)) if (first..=last).contains(&number))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_hold_the_allowed_cpus_that_their_lists_name() {
        let lists = ["0-3,8-11\n", "", "4-7,12", "13", "no list"];
        let all: Vec<usize> = (0..13).collect();
        let two = Topology::new(&all, &lists);
        assert_eq!(two.nodes, [vec![0, 1, 2, 3, 8, 9, 10, 11], vec![4, 5, 6, 7, 12]]);
        assert_eq!([3, 12, 99].map(|cpu| two.node_of(cpu)), [0, 1, 0]);
        // Confined to one node, or told nothing: one node of all that is allowed.
        assert_eq!(Topology::new(&[4, 6], &lists).nodes, [[4, 6]]);
        assert_eq!(Topology::new(&all, &[""; 0]).nodes, [all]);
        assert_eq!(Topology::new(&[], &lists).nodes, [[]; 1]);
    }

    #[test]
    fn threads_and_tasks_are_shared_by_the_cpus_of_a_node_and_none_is_lost() {
        let odd = Topology { nodes: vec![vec![0], vec![1, 2, 3], vec![4, 5]] };
        assert_eq!(odd.homes(6), [0, 1, 1, 1, 2, 2]);
        assert_eq!(odd.homes(12), [0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2]);
        for threads in 1..20 {
            let homes = odd.homes(threads);
            assert!(homes.len() == threads && homes.is_sorted());
            let ends: Vec<usize> = (0..3).map(|node| homes.partition_point(|&home| home <= node)).collect();
            for tasks in 0..40 {
                let shares: Vec<usize> = (0..3).flat_map(|node| share(&ends, tasks, node)).collect();
                assert_eq!(shares, (0..tasks).collect::<Vec<_>>());
            }
        }
    }
}
