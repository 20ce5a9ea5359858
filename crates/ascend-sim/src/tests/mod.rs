//! The exported functions, called as a C program calls them.
//!
//! [`RULES`] says by which test each rule of the simulator is held.

mod collectives;
mod faults;
mod graphs;
mod harness;
mod memory;
mod operands;
mod streams;
mod threads;
mod two_phase;

/// Number of a rule, what it says, and the test that holds it.
const RULES: [(u32, &str, fn()); 32] = [
    (1, "calls before aclInit", threads::a_call_before_init_is_refused),
    (2, "a second aclInit", threads::a_second_init_is_told),
    (3, "a thread without a device", threads::a_thread_without_a_device_is_told),
    (4, "a device that is not there", threads::a_device_that_is_not_there_is_refused),
    (
        5,
        "a stream of another context, or destroyed",
        threads::a_stream_of_another_context_and_a_destroyed_one_are_refused,
    ),
    (6, "the host follows a device pointer", memory::a_host_that_follows_a_device_pointer_crashes),
    (7, "a range that is not in one block", memory::a_range_past_the_end_poisons_the_context),
    (8, "use after free, double free", memory::a_double_free_and_a_use_after_free_are_violations),
    (9, "zero bytes, free of null", memory::zero_bytes_and_a_null_free_are_refused),
    (10, "memory is not zeroed", memory::new_memory_is_garbage),
    (11, "a tensor that is not aligned", operands::a_tensor_off_its_boundary_is_a_violation),
    (12, "more bytes than room", memory::more_bytes_than_room_are_refused),
    (13, "pageable memory in a queued copy", memory::pageable_memory_in_a_queued_copy_is_refused),
    (14, "nothing is visible before a synchronise", two_phase::a_sum_is_there_after_a_synchronise_and_not_before),
    (15, "a blocking copy does not wait for streams", memory::a_blocking_copy_does_not_wait_for_streams),
    (16, "free of memory that a queued task needs", memory::a_free_of_memory_that_a_queued_task_needs_is_a_violation),
    (17, "an executor twice, elsewhere, or never", two_phase::an_executor_runs_once_on_its_own_thread_or_is_reported),
    (18, "a null workspace", two_phase::a_null_workspace_is_refused_and_the_executor_is_gone),
    (19, "a small workspace", two_phase::a_workspace_is_odd_and_overwritten_whole_and_a_smaller_one_is_a_violation),
    (20, "an operand that is gone in phase 2", two_phase::an_operand_destroyed_between_the_phases_is_a_violation),
    (21, "an element and its list both destroyed", operands::an_element_destroyed_beside_its_list_is_a_violation),
    (22, "leaks", faults::what_is_left_over_is_in_the_report),
    (23, "a dtype that the chip lacks", two_phase::bf16_is_refused_on_310p_in_every_operator),
    (24, "a shape beyond a kernel", two_phase::a_shape_that_an_operator_cannot_take_is_refused_in_phase_1),
    (25, "an index out of range", two_phase::a_fault_of_a_kernel_shows_at_the_next_synchronise),
    (26, "duplicate slots", two_phase::what_a_kernel_reports_as_undefined_is_a_violation),
    (27, "unsafe calls during capture", graphs::an_unsafe_call_ends_a_capture),
    (28, "lengths are frozen in a capture", graphs::a_replay_has_the_scalars_of_its_capture),
    (29, "out of memory", memory::memory_ends_at_the_budget_and_comes_back_with_a_free),
    (30, "an injected fault", faults::a_fault_comes_at_the_call_that_was_named),
    (31, "the error text", threads::an_error_text_is_of_its_thread_and_is_read_once),
    (32, "an event without SYNC", streams::an_event_without_sync_cannot_be_waited_for),
];

#[test]
fn every_rule_has_a_test() {
    assert_eq!(RULES.map(|(number, ..)| number).to_vec(), (1..=32).collect::<Vec<_>>());
}
