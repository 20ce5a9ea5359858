//! What each kind of specification lets through.

mod common;

use baton_grammar::{Literal, Spec, Structure, Tool, ToolChoice, ToolFrame};
use common::{CALL, END, END_CALL, accepts, begin, ids, mask, taken};
use serde_json::{Value, json};

/// Accepts these texts and refuses those.
fn check(spec: &Spec, good: &[&str], bad: &[&str]) {
    for text in good {
        assert!(accepts(spec, text), "{text:?} should be an output of {spec:?}");
    }
    for text in bad {
        assert!(!accepts(spec, text), "{text:?} should be no output of {spec:?}");
    }
}

fn schema(schema: Value) -> Spec {
    Spec::JsonSchema(schema)
}

#[test]
fn any_object_is_an_object_and_nothing_else() {
    let good = ["{}", r#"{"a": 1}"#, r#"{"a":[1,2,{"b":null}],"c":"é\n"}"#];
    check(&Spec::JsonObject, &good, &["", "[]", "1", r#"{"a":}"#, "{} ", " {}", "{\n}", r#"{"a":"<|end|>"}"#]);
}

#[test]
fn a_schema_lets_through_what_it_accepts() {
    let person = schema(json!({
        "type": "object",
        "properties": { "name": { "type": "string" }, "age": { "type": "integer", "minimum": 0, "maximum": 150 } },
        "required": ["name", "age"],
        "additionalProperties": false,
    }));
    let bad =
        [r#"{"name":"Ann"}"#, r#"{"name":"Ann","age":151}"#, r#"{"name":1,"age":3}"#, r#"{"name":"A","age":3,"x":1}"#];
    check(&person, &[r#"{"name":"Ann","age":31}"#, r#"{"name": "", "age": 0}"#], &bad);
    check(&schema(json!(true)), &["1", "{}", "[null]"], &["", "x"]);
    let list = schema(json!({ "$ref": "#/$defs/list", "$defs": { "list": {
        "anyOf": [{ "type": "null" }, { "type": "array", "prefixItems": [{ "type": "integer" }, { "$ref": "#/$defs/list" }],
            "items": false, "minItems": 2 }],
    }}}));
    check(&list, &["null", "[1,null]", "[1,[2,[3,null]]]"], &["[]", "[1]", "[1,2]", "1"]);
}

#[test]
fn a_regular_expression_matches_the_whole_output() {
    check(&Spec::Regex("[0-9]{3}-[a-z]+".into()), &["123-ab"], &["123-", "12-ab", "123-ab ", "123-aB"]);
    check(&Spec::Regex("^(yes|no)$".into()), &["yes", "no"], &["maybe", "yesno"]);
    check(&Spec::Regex(r"a/b\$".into()), &["a/b$"], &["a/b"]);
}

#[test]
fn a_choice_is_one_of_its_texts() {
    let spec = Spec::Choice(vec!["yes".into(), "yesterday".into(), "\"q\"\n".into()]);
    check(&spec, &["yes", "yesterday", "\"q\"\n"], &["", "ye", "no", "yes "]);
}

#[test]
fn a_grammar_may_be_lark_or_gbnf() {
    let lark = "start: sum\nsum: NUMBER (\"+\" sum)?\nNUMBER: /[0-9]+/\n";
    let gbnf = "# a sum\nroot ::= sum\nsum ::= number (\"+\" sum)?\nnumber ::= [0-9]+\n";
    for text in [lark, gbnf] {
        check(&Spec::Grammar(text.into()), &["1", "1+2", "12+34+5"], &["", "+", "1+", "1+a", "1 + 2"]);
    }
    // Without recursion, all of it is one regular expression.
    let words =
        "root ::= greeting \" \" name? [^\\]\\x41-\\x43]{2,3}\ngreeting ::= \"hi\" | 'hello'\nname ::= [a-z]* \"x\"\n";
    check(&Spec::Grammar(words.into()), &["hi yy", "hello abxzzz", "hi 日本"], &["hi y", "hi AB", "hey yy", "hi ]]"]);
}

const JSON: &str = r#"
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws     ::= | " " | "\n" [ \t]{0,20}
"#;

#[test]
fn the_json_grammar_in_gbnf_is_json() {
    let good = ["{}", "{ }", r#"{"a": [1, -2.5e3, "x\n", {"b":null}]}"#, "{\n  \"a\": true\n}"];
    check(&Spec::Grammar(JSON.into()), &good, &["[]", "{,}", r#"{"a"}"#, r#"{"a":1,}"#]);
}

fn frame() -> ToolFrame {
    let text = |text: &str| Literal::Text(text.into());
    ToolFrame {
        begin: vec![],
        before_name: vec![Literal::Token(CALL), text("\n{\"name\": \"")],
        before_arguments: vec![text("\", \"arguments\": ")],
        after_arguments: vec![text("}\n"), Literal::Token(END_CALL)],
        between: vec![text("\n")],
        end: vec![],
    }
}

fn tools(frame: ToolFrame, choice: ToolChoice, parallel: bool) -> Spec {
    let parameters = json!({ "type": "object", "properties": { "a": { "type": "integer" } }, "required": ["a"],
        "additionalProperties": false });
    let tool = |name: &str, strict| Tool { name: name.into(), parameters: parameters.clone(), strict };
    Spec::Tools { frame, tools: vec![tool("get", true), tool("put", false)], choice, parallel }
}

const GET: &str = "<tool_call>\n{\"name\": \"get\", \"arguments\": {\"a\":1}}\n</tool_call>";
const PUT: &str = "<tool_call>\n{\"name\": \"put\", \"arguments\": {\"b\":[]}}\n</tool_call>";

#[test]
fn required_calls_are_calls_only() {
    let (two, three) = (format!("{GET}\n{PUT}"), format!("{PUT}\n{PUT}\n{GET}"));
    let wrong = GET.replace("\"a\"", "\"b\"");
    let bad = ["", "hello", &format!("hello{GET}"), &format!("{GET}{GET}"), &wrong, &GET.replace("get", "got")];
    check(&tools(frame(), ToolChoice::Required, true), &[GET, PUT, &two, &three], &bad);
    check(&tools(frame(), ToolChoice::Required, false), &[GET, PUT], &[&two]);
    check(&tools(frame(), ToolChoice::Named("put".into()), true), &[PUT], &[GET, &format!("{PUT}\n{PUT}")]);
}

#[test]
fn calls_may_follow_text_where_the_model_decides() {
    let auto = || ToolChoice::Auto { otherwise: None };
    let wrong = GET.replace("\"a\"", "\"b\"");
    let good = ["", "hello, <tool", GET, &format!("Let me see.\n{GET}\n{PUT}")];
    check(&tools(frame(), auto(), true), &good, &[&wrong, &format!("{GET} and"), &format!("{GET}\n")]);

    let text = ToolFrame {
        before_name: vec![Literal::Text("CALL(".into())],
        after_arguments: vec![Literal::Text(")".into())],
        before_arguments: vec![Literal::Text(", ".into())],
        ..ToolFrame::default()
    };
    let good = ["", "hello CALL", r#"CALL(get, {"a":1})"#, r#"I say CALL(get, {"a":1})CALL(put, {})"#];
    check(&tools(text, auto(), true), &good, &["CALL(", "CALL(got, {})", r#"CALL(get, {})"#]);
}

#[test]
fn an_answer_without_calls_may_have_a_form_too() {
    let otherwise = Some(Box::new(schema(json!({ "type": "array", "items": { "type": "integer" } }))));
    check(&tools(frame(), ToolChoice::Auto { otherwise }, true), &["[1,2]", "[]", GET], &["hello", "", "{}"]);
}

#[test]
fn structures_begin_at_their_triggers() {
    let structure = |name: &str, kind: &str| Structure {
        begin: format!("<fn={name}>"),
        schema: json!({ "type": kind }),
        end: "</fn>".into(),
    };
    let structures = vec![structure("a", "integer"), structure("b", "boolean")];
    let spec = Spec::StructuralTag { structures, triggers: vec!["<fn=".into()] };
    let good = ["", "hello", "x <fn=a>1</fn> y <fn=b>true</fn>", "<f"];
    check(&spec, &good, &["<fn=", "<fn=c>1</fn>", "<fn=a>true</fn>", "<fn=a>1"]);
}

#[test]
fn the_end_is_allowed_where_the_output_may_end_and_only_there() {
    let mut constraint = begin(&Spec::Regex("ab|abc".into()), None);
    let allowed =
        |constraint: &mut dyn baton_model::Constraint| mask(constraint).expect("one").ids().collect::<Vec<_>>();
    assert!(!allowed(&mut *constraint).contains(&END));
    assert_eq!(taken(&mut *constraint, &ids("ab")), 2);
    assert_eq!(allowed(&mut *constraint), [u32::from(b'c'), END]);
    assert_eq!(taken(&mut *constraint, &ids("c")), 1);
    assert_eq!(allowed(&mut *constraint), [END]);
}

#[test]
fn a_stop_token_with_a_text_ends_the_output_where_that_is_allowed_or_nothing_else_is() {
    let grammar = common::COMPILER.compile(&Spec::Regex("z+b".into()), None).expect("valid");
    let mut constraint = grammar.begin(&[u32::from(b'z'), END]);
    // All that could follow is the stop token.
    assert_eq!(mask(&mut *constraint).expect("one").ids().collect::<Vec<_>>(), [u32::from(b'z')]);
}

#[test]
fn masks_ahead_are_those_that_come() {
    let spec = schema(json!({ "type": "array", "items": { "enum": ["foo", "bar", 12] } }));
    let output = ids(r#"["foo", 12,"bar"]"#);
    for wrong in [None, Some(3)] {
        let mut draft = output.clone();
        if let Some(at) = wrong {
            draft[at] = u32::from(b'!');
        }
        let (mut plain, mut drafting) = (begin(&spec, None), begin(&spec, None));
        for (at, &token) in output.iter().enumerate() {
            let ahead = drafting.masks(&draft[at..]).expect("masks");
            assert_eq!(ahead[0], mask(&mut *plain));
            let wrong = wrong.filter(|&wrong| wrong >= at);
            assert_eq!(ahead.len(), wrong.map_or(output.len() - at + 1, |wrong| wrong - at + 1));
            let mut follows = begin(&spec, None);
            taken(&mut *follows, &output[..at]);
            for (i, expected) in ahead.iter().enumerate() {
                assert_eq!(mask(&mut *follows), *expected);
                taken(&mut *follows, &output[at + i..=(at + i).min(output.len() - 1)]);
            }
            plain.accept(token).expect("allowed");
            drafting.accept(token).expect("allowed");
        }
    }
}

#[test]
fn sequences_of_one_grammar_do_not_share_their_state() {
    let spec = Spec::Choice(vec!["ab".into(), "cd".into()]);
    let grammar = common::COMPILER.compile(&spec, None).expect("valid");
    let (mut one, mut other) = (grammar.begin(&[END]), grammar.begin(&[END]));
    assert_eq!(taken(&mut *one, &ids("ab")), 2);
    assert_eq!(taken(&mut *other, &ids("cd")), 2);
    assert_eq!(mask(&mut *one), mask(&mut *other));
}
