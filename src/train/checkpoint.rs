//! Checkpoints: all persistent state of a run in a safetensors file, its position in a small JSON file.
//!
//! `state.json` names the tensor file it belongs to and is renamed into place last: whenever the process or
//! the machine dies, the folder holds one whole checkpoint (or none).

use std::borrow::Cow;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors, View as Saved};
use serde::{Deserialize, Serialize};

use crate::atomic;
use crate::error::{Error, Result};
use crate::exec::{Purpose, Session};
use crate::graph::StateId;
use crate::tensor::{DType, View};
use crate::train::fit::{CheckpointOptions, Fitted, Running};

const STATE: &str = "state.json";
const VERSION: u32 = 1;

/// How far a run has come.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Position {
    pub fitted: Fitted,
    pub running: Running,
}

#[derive(Debug, Serialize, Deserialize)]
struct State {
    version: u32,
    fingerprint: String,
    tensors: String,
    position: Position,
}

/// The folder that a run's checkpoints are kept in.
pub struct Checkpoints {
    folder: PathBuf,
    every: usize,
    fingerprint: String,
    current: Option<String>,
}

impl Checkpoints {
    /// Opens (or makes) the folder; when resuming, restores what it holds into the session and `position`.
    ///
    /// Fails when the checkpoint is of another run, and when there is one and the run does not resume.
    pub fn open(options: &CheckpointOptions, session: &mut Session, position: &mut Position) -> Result<Self> {
        let folder = options.folder.clone();
        fs::create_dir_all(&folder).map_err(|e| Error::io(&folder, e))?;
        let mut checkpoints = Checkpoints {
            folder,
            every: options.every.max(1),
            fingerprint: options.fingerprint.clone(),
            current: None,
        };
        let path = checkpoints.folder.join(STATE);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(checkpoints),
            Err(e) => return Err(Error::io(&path, e)),
        };
        if !options.resume {
            return Err(Error::file(
                &path,
                "a run's checkpoint is here already: continue it with --resume, or name another folder",
            ));
        }
        let state: State = serde_json::from_slice(&text)
            .map_err(|e| Error::file(&path, format!("not a checkpoint: {e}")))?;
        if state.version != VERSION {
            return Err(Error::file(&path, format!("written by another version ({})", state.version)));
        }
        if state.fingerprint != checkpoints.fingerprint {
            return Err(Error::file(
                &path,
                "belongs to a run with another model, other data or other options; \
                 resume with those, or name another folder",
            ));
        }
        if state.tensors.contains(['/', '\\']) {
            return Err(Error::file(&path, "names a tensor file outside the folder"));
        }
        restore(&checkpoints.folder.join(&state.tensors), session)?;
        checkpoints.current = Some(state.tensors);
        *position = state.position;
        Ok(checkpoints)
    }

    pub fn every(&self) -> usize {
        self.every
    }

    /// Writes the session's state; the checkpoint before is removed afterwards.
    pub fn save(&mut self, session: &Session, position: &Position) -> Result<()> {
        let name = format!("step-{}.safetensors", position.fitted.steps);
        let store = session.store();
        let tensors = kept(session).map(|id| (store.name(id).to_string(), Stored(store.view(id))));
        let path = self.folder.join(&name);
        // Tensor by tensor: never a second copy of all of them.
        atomic::write_named(&path, |file| {
            let permissions = file.as_file().metadata().map(|m| m.permissions());
            safetensors::serialize_to_file(tensors, None, file.path())
                .map_err(|e| Error::file(&path, format!("cannot be written: {e}")))?;
            permissions.and_then(|p| fs::set_permissions(file.path(), p)).map_err(|e| Error::io(&path, e))
        })?;
        let state = State {
            version: VERSION,
            fingerprint: self.fingerprint.clone(),
            tensors: name.clone(),
            position: position.clone(),
        };
        let path = self.folder.join(STATE);
        let text = serde_json::to_vec_pretty(&state).map_err(|e| Error::file(&path, e.to_string()))?;
        atomic::write_bytes(&path, &text)?;
        if let Some(before) = self.current.replace(name.clone()).filter(|b| *b != name) {
            // Left behind, it costs space and nothing else.
            let _ = fs::remove_file(self.folder.join(before));
        }
        Ok(())
    }
}

/// The states that outlive a step.
fn kept(session: &Session) -> impl Iterator<Item = StateId> + use<'_> {
    let store = session.store();
    store.ids().filter(|id| {
        use Purpose::{Optimizer, Parameter, Sample, Statistic};
        matches!(store.purpose(*id), Parameter | Statistic | Optimizer | Sample)
    })
}

fn restore(path: &Path, session: &mut Session) -> Result<()> {
    let bytes = crate::import::map::map(path)?;
    let damaged = |what: String| Error::file(path, what);
    let saved = SafeTensors::deserialize(&bytes).map_err(|e| damaged(format!("is damaged: {e}")))?;
    let ids: Vec<StateId> = kept(session).collect();
    for id in ids {
        let name = session.store().name(id).to_string();
        let meta = session.store().meta(id).clone();
        let t = saved.tensor(&name).map_err(|_| damaged(format!("lacks '{name}'")))?;
        if t.shape() != meta.dims.as_slice() || t.data().len() != meta.bytes() {
            return Err(damaged(format!("holds '{name}' in another shape")));
        }
        session.store_mut().set(id, t.data());
    }
    Ok(())
}

/// A tensor as safetensors takes it.
pub(crate) struct Stored<'a>(pub View<'a>);

impl Saved for Stored<'_> {
    fn dtype(&self) -> Dtype {
        match self.0.dtype {
            DType::F32 => Dtype::F32,
            DType::F64 => Dtype::F64,
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::BF16,
            DType::I8 => Dtype::I8,
            DType::I16 => Dtype::I16,
            DType::I32 => Dtype::I32,
            DType::I64 => Dtype::I64,
            DType::U8 => Dtype::U8,
            DType::U16 => Dtype::U16,
            DType::U32 => Dtype::U32,
            DType::U64 => Dtype::U64,
            DType::Bool => Dtype::BOOL,
            // No state has a narrow type; its bytes would be these.
            _ => Dtype::U8,
        }
    }

    fn shape(&self) -> &[usize] {
        self.0.dims
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(self.0.bytes)
    }

    fn data_len(&self) -> usize {
        self.0.bytes.len()
    }
}
