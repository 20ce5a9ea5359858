//! OpenAI's Responses API: `/v1/responses`, and what is kept of it in a state folder.
//!
//! A request's items are translated into a chat, and the chat's output becomes items again. Reasoning is shown in clear as
//! the `content` of its item, or as its own summary where one is asked for. Without a state folder nothing is kept:
//! `store` is false unless it is asked for, which is refused.

mod assembly;
mod background;
mod input;
mod reply;
mod request;
mod store;

pub(crate) use background::run as run_in_background;
pub(crate) use reply::ResponseFormat;
pub(crate) use request::{Keeping, ResponseRequest, their_name};
pub(crate) use store::{PREFIX, Record, Responses};
