//! Where tensors lie in a model: through functions, subgraphs and attributes.

use super::wire::{self, WireError};

/// Messages that tensors lie in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message {
    Model,
    Function,
    Graph,
    Node,
    Attribute,
    Sparse,
    Tensor,
}

impl Message {
    /// The message that a field of this one holds, if tensors lie in it.
    pub fn field(self, number: u32) -> Option<Message> {
        use Message::*;
        Some(match (self, number) {
            (Model, 7) | (Attribute, 6 | 11) => Graph,
            (Model, 25) => Function,
            (Function, 7) | (Graph, 1) => Node,
            (Function, 11) | (Node, 5) => Attribute,
            (Graph, 5) | (Attribute, 5 | 10) | (Sparse, 1 | 2) => Tensor,
            (Graph, 15) | (Attribute, 22 | 23) => Sparse,
            _ => return None,
        })
    }
}

/// The field numbers that lead from a model to the tensor's field which holds byte `at`.
pub fn path_to(bytes: &[u8], at: usize) -> Result<Vec<u32>, WireError> {
    let missing = WireError { at, what: "no tensor lies here" };
    let (mut range, mut message, mut path) = (0..bytes.len(), Message::Model, Vec::new());
    loop {
        let holds = |f: &Result<wire::Field, WireError>| f.as_ref().map_or(true, |f| f.payload.contains(&at));
        let field = wire::fields(bytes, range).find(holds).ok_or(missing.clone())??;
        path.push(field.number);
        if message == Message::Tensor {
            return Ok(path);
        }
        message = message.field(field.number).ok_or(missing.clone())?;
        range = field.payload;
    }
}
