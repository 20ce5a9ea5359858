//! `tools`, `tool_choice` and `parallel_tool_calls`: which tools a chat may call, and how.
//!
//! [`Tools`] holds nothing unchecked: names are plain and unique, and a choice names tools that are there. What the tools' schemas mean is judged where a grammar is made of them.

use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::fields::Fields;

/// Most tools of one request.
pub(crate) const MAX_TOOLS: usize = 128;
/// Longest name of a tool, in bytes.
const MAX_NAME_BYTES: usize = 64;

/// A tool that the client can call for the model.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tool {
    pub name: String,
    pub description: Option<String>,
    /// JSON Schema of its arguments, an object. `None`: any.
    pub parameters: Option<Map<String, Value>>,
    /// Its arguments must be as the schema says.
    pub strict: bool,
}

/// What the model may do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum ToolChoice {
    /// Answer or call tools.
    #[default]
    Auto,
    /// Answer.
    None,
    /// Call at least one tool.
    Required,
    /// Call this tool.
    Named(String),
}

/// The tools of a request.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tools {
    /// What the model is told of; perhaps nothing.
    all: Vec<Tool>,
    /// Those that it may call, if not all.
    allowed: Option<Vec<String>>,
    choice: ToolChoice,
    /// Several calls may come in one answer.
    parallel: bool,
}

impl Tool {
    /// Reads an object with `name`, `description`, `parameters` and `strict`, and refuses what else it has.
    fn read(mut fields: Fields) -> Result<Self, ApiError> {
        let name = fields.string("name")?;
        let tool = Self {
            name: fields.required("name", name)?,
            description: fields.string("description")?,
            parameters: fields.object("parameters")?.map(Fields::into_rest),
            strict: fields.bool("strict")?.unwrap_or(false),
        };
        fields.finish()?;
        Ok(tool)
    }

    fn for_template(&self) -> Value {
        let mut function = Map::new();
        function.insert("name".into(), self.name.as_str().into());
        if let Some(description) = &self.description {
            function.insert("description".into(), description.as_str().into());
        }
        if let Some(parameters) = &self.parameters {
            function.insert("parameters".into(), parameters.clone().into());
        }
        json!({"type": "function", "function": function})
    }
}

impl Tools {
    /// Reads the fields of a chat.
    pub fn read(fields: &mut Fields) -> Result<Self, ApiError> {
        let tools = fields.array("tools")?.unwrap_or_default();
        let tool = |(i, tool)| {
            let mut tool = fields.item(format!("tools[{i}]"), tool)?;
            function_type(&mut tool)?;
            let function = tool.object("function")?;
            let function = tool.required("function", function)?;
            tool.finish()?;
            Tool::read(function)
        };
        let all = tools.into_iter().enumerate().map(tool).collect::<Result<Vec<_>, _>>()?;
        let (choice, allowed) = choice(fields)?;
        let parallel = fields.bool("parallel_tool_calls")?.unwrap_or(true);
        Self { all, allowed, choice, parallel }.checked()
    }

    fn checked(self) -> Result<Self, ApiError> {
        if self.all.len() > MAX_TOOLS {
            return Err(ApiError::out_of_range("tools", format!("an array of at most {MAX_TOOLS} tools")));
        }
        let plain = |name: &str| {
            (1..=MAX_NAME_BYTES).contains(&name.len())
                && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'))
        };
        for (i, tool) in self.all.iter().enumerate() {
            if !plain(&tool.name) || self.all[..i].iter().any(|other| other.name == tool.name) {
                let accepted = format!(
                    "tools whose names have 1 to {MAX_NAME_BYTES} letters, digits, hyphens and underscores and differ"
                );
                return Err(ApiError::out_of_range("tools", accepted));
            }
        }
        let has = |name: &String| self.all.iter().any(|tool| tool.name == *name);
        let named = if let ToolChoice::Named(name) = &self.choice { Some(name) } else { None };
        let demanding = named.is_some() || self.choice == ToolChoice::Required;
        if !named.into_iter().chain(self.allowed.iter().flatten()).all(has) || (demanding && self.all.is_empty()) {
            return Err(ApiError::invalid("tool_choice", "tool_choice must name tools of this request"));
        }
        Ok(self)
    }

    /// What the template is told: of all tools, also of those that may not be called, so that the prompt stays the same.
    pub fn for_template(&self) -> Option<Value> {
        (!self.all.is_empty()).then(|| self.all.iter().map(Tool::for_template).collect())
    }

    /// The tools that the model may choose from, if it chooses.
    pub fn allowed(&self) -> impl Iterator<Item = &Tool> {
        let allows = |tool: &&Tool| self.allowed.as_ref().is_none_or(|allowed| allowed.contains(&tool.name));
        self.all.iter().filter(allows)
    }

    /// Whether the model may choose from all of them.
    pub fn are_all_allowed(&self) -> bool {
        self.allowed.is_none()
    }

    /// The tools that may be called; none if the model is to answer.
    pub fn callable(&self) -> impl Iterator<Item = &Tool> {
        self.allowed().filter(|tool| match &self.choice {
            ToolChoice::None => false,
            ToolChoice::Named(name) => tool.name == *name,
            ToolChoice::Auto | ToolChoice::Required => true,
        })
    }

    /// What the model may do.
    pub fn choice(&self) -> &ToolChoice {
        &self.choice
    }

    /// Whether the answer ends with its first call.
    pub fn single(&self) -> bool {
        !self.parallel
    }
}

/// `type`, where only functions are known.
fn function_type(fields: &mut Fields) -> Result<(), ApiError> {
    let kind = fields.string("type")?;
    match fields.required("type", kind)?.as_str() {
        "function" => Ok(()),
        _ => Err(ApiError::unsupported(&fields.path("type"))),
    }
}

const CHOICE: &str = "none, auto, required, or an object that names a function or allowed tools";

/// `tool_choice`, and the tools that it allows if it says so.
fn choice(fields: &mut Fields) -> Result<(ToolChoice, Option<Vec<String>>), ApiError> {
    let choice = match fields.take("tool_choice") {
        None => ToolChoice::Auto,
        Some(Value::String(word)) => mode("tool_choice", &word)?,
        Some(choice @ Value::Object(_)) => {
            let mut choice = fields.item("tool_choice".into(), choice)?;
            if let Some(mut allowed) = choice.object("allowed_tools")? {
                let kind = choice.string("type")?;
                if choice.required("type", kind)? != "allowed_tools" {
                    return Err(ApiError::out_of_range("tool_choice", CHOICE));
                }
                choice.finish()?;
                let word = allowed.string("mode")?;
                let mode = mode("tool_choice.allowed_tools.mode", &allowed.required("mode", word)?)?;
                let tools = allowed.array("tools")?;
                let tools = allowed.required("tools", tools)?.into_iter().enumerate();
                let path = allowed.path("tools");
                allowed.finish()?;
                let names = tools.map(|(i, tool)| function_name(allowed.item(format!("{path}[{i}]"), tool)?));
                return Ok((mode, Some(names.collect::<Result<_, _>>()?)));
            }
            ToolChoice::Named(function_name(choice)?)
        }
        Some(_) => return Err(ApiError::wrong_type("tool_choice", CHOICE)),
    };
    Ok((choice, None))
}

fn mode(path: &str, word: &str) -> Result<ToolChoice, ApiError> {
    match word {
        "auto" => Ok(ToolChoice::Auto),
        "none" => Ok(ToolChoice::None),
        "required" => Ok(ToolChoice::Required),
        _ => Err(ApiError::out_of_range(path, CHOICE)),
    }
}

/// The name in `{"type": "function", "function": {"name": …}}`.
fn function_name(mut fields: Fields) -> Result<String, ApiError> {
    function_type(&mut fields)?;
    let function = fields.object("function")?;
    let mut function = fields.required("function", function)?;
    fields.finish()?;
    let name = function.string("name")?;
    let name = function.required("name", name)?;
    function.finish()?;
    Ok(name)
}
