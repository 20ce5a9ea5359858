//! Thinking before the answer, and its budget.

mod common;

use baton_grammar::{Spec, Thinking};
use baton_model::{Constraint, TokenMask};
use common::{CLOSE, END, OPEN, begin, ids, mask, taken};

fn thinking(starts_inside: bool, budget: Option<usize>) -> Option<Thinking> {
    Some(Thinking { open: OPEN, close: CLOSE, starts_inside, budget })
}

fn answer() -> Spec {
    Spec::Choice(vec!["yes".into(), "no".into()])
}

fn allows(constraint: &mut dyn Constraint, id: u32) -> bool {
    mask(constraint).is_none_or(|mask| mask.allows(id))
}

fn only(constraint: &mut dyn Constraint) -> Vec<u32> {
    mask(constraint).iter().flat_map(TokenMask::ids).collect()
}

#[test]
fn the_grammar_begins_behind_the_thinking() {
    let cases = [
        (true, "hm, is it?</think>yes"),
        (true, "</think>\n\nno"),
        (true, "\n</think>  yes"),
        (false, "<think>hm</think>yes"),
        (false, "<think></think>\nno"),
        (false, "yes"),
    ];
    for (inside, text) in cases {
        let mut constraint = begin(&answer(), thinking(inside, None));
        let all = ids(text);
        assert_eq!(taken(&mut *constraint, &all), all.len(), "{text:?}");
        assert_eq!(only(&mut *constraint), [END], "{text:?}");
    }
}

#[test]
fn what_is_no_answer_is_refused_behind_the_thinking_and_without_any() {
    let cases = [(true, "a</think>maybe", 2), (true, "</think>    yes", 3), (false, "hm", 0), (false, " yes", 0)];
    for (inside, text, good) in cases {
        let mut constraint = begin(&answer(), thinking(inside, None));
        assert_eq!(taken(&mut *constraint, &ids(text)), good, "{text:?}");
    }
}

#[test]
fn thinking_neither_ends_the_output_nor_closes_in_pieces() {
    let mut constraint = begin(&answer(), thinking(true, None));
    let thoughts = ids("a < b </ </think");
    assert_eq!(taken(&mut *constraint, &thoughts[..thoughts.len()]), thoughts.len());
    assert!(!allows(&mut *constraint, u32::from(b'>')), "this would complete the marker unseen");
    assert!(!allows(&mut *constraint, END));
    assert!(allows(&mut *constraint, CLOSE));
    assert!(allows(&mut *constraint, u32::from(b'!')));
    assert_eq!(taken(&mut *constraint, &ids("!>")), 2);
}

#[test]
fn the_budget_closes_the_thinking() {
    for (inside, before) in [(true, ""), (false, "<think>")] {
        for budget in [0, 1, 5] {
            let mut constraint = begin(&answer(), thinking(inside, Some(budget)));
            let thoughts = ids(&format!("{before}{}", "x".repeat(budget)));
            assert_eq!(taken(&mut *constraint, &thoughts), thoughts.len());
            assert_eq!(only(&mut *constraint), [CLOSE], "{before} {budget}");
            assert_eq!(taken(&mut *constraint, &ids("</think>yes")), 4);
            assert_eq!(only(&mut *constraint), [END]);
        }
    }
}

#[test]
fn a_budget_alone_leaves_the_rest_free() {
    for (inside, before) in [(true, ""), (false, "<think>"), (false, "  <think>"), (false, "\n<th")] {
        let mut constraint = begin(&Spec::Any, thinking(inside, Some(2)));
        if before.ends_with("<th") {
            // The opening marker in pieces of text.
            for piece in ["\n", "<th", "ink", ">"] {
                let id = (0..common::tokens().len() as u32).find(|&id| common::text(&[id]) == piece.as_bytes());
                constraint.accept(id.expect("a token")).expect("free");
            }
        } else {
            taken(&mut *constraint, &ids(before));
        }
        assert_eq!(mask(&mut *constraint), None, "{before:?}");
        taken(&mut *constraint, &ids("ab"));
        assert_eq!(only(&mut *constraint), [CLOSE], "{before:?}");
        taken(&mut *constraint, &ids("</think>"));
        assert_eq!(mask(&mut *constraint), None);
        taken(&mut *constraint, &ids("anything <think> of any length"));
        assert_eq!(mask(&mut *constraint), None);
    }
    // An answer without thinking is not bounded.
    let mut constraint = begin(&Spec::Any, thinking(false, Some(0)));
    assert_eq!(taken(&mut *constraint, &ids("answer <think>at once")), 15);
    assert_eq!(mask(&mut *constraint), None);
}

#[test]
fn masks_ahead_are_those_that_come_across_the_end_of_the_thinking() {
    let output = ids("ab</think>\nyes");
    for budget in [None, Some(2)] {
        let mut constraint = begin(&answer(), thinking(true, budget));
        for at in 0..=output.len() {
            let ahead = constraint.masks(&output[at..]).expect("masks");
            assert_eq!(ahead.len(), output.len() - at + 1);
            let mut follows = begin(&answer(), thinking(true, budget));
            taken(&mut *follows, &output[..at]);
            for (i, expected) in ahead.iter().enumerate() {
                assert_eq!(mask(&mut *follows), *expected, "{at} {i}");
                if let Some(&token) = output.get(at + i) {
                    follows.accept(token).expect("allowed");
                }
            }
            if let Some(&token) = output.get(at) {
                constraint.accept(token).expect("allowed");
            }
        }
    }
}
