//! Files that appear whole or not at all.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::Stored;
use crate::error::{Error, Result};
use crate::import::wire::{self, Segment};

/// Files being made in a folder of their own, inside the one they are for. Dropping it removes them.
pub(super) struct Stage {
    folder: PathBuf,
    temporary: TempDir,
    /// Relative to either folder, in the order in which they are put in place.
    files: Vec<PathBuf>,
}

/// What has been put in place, to be undone if the rest fails.
struct Placed {
    target: PathBuf,
    /// Where the file that was there before is kept.
    before: Option<PathBuf>,
}

impl Stage {
    /// `folder` has to exist.
    pub fn new(folder: &Path) -> Result<Stage> {
        let temporary = tempfile::Builder::new()
            .prefix(".retune-")
            .tempdir_in(folder)
            .map_err(|e| Error::io(folder, e))?;
        Ok(Stage { folder: folder.to_path_buf(), temporary, files: Vec::new() })
    }

    /// The file written last.
    pub fn last(&self) -> Option<PathBuf> {
        self.files.last().map(|f| self.inside(f))
    }

    fn inside(&self, relative: &Path) -> PathBuf {
        self.temporary.path().join("new").join(relative)
    }

    fn prepare(&self, relative: &Path) -> Result<PathBuf> {
        let path = self.inside(relative);
        let parent = path.parent().unwrap_or(self.temporary.path());
        fs::create_dir_all(parent).map_err(|e| Error::io(parent, e))?;
        Ok(path)
    }

    /// Writes and syncs `original` with its edits, and over them what `placed` says: where, and the bytes.
    pub fn write<'a>(
        &mut self,
        relative: &Path,
        original: &[u8],
        segments: &[Segment],
        placed: impl Iterator<Item = Result<(usize, Stored<'a>)>>,
    ) -> Result<()> {
        let path = self.prepare(relative)?;
        let target = self.folder.join(relative);
        let fail = |e| Error::io(&target, e);
        let mut file = File::create_new(&path).map_err(fail)?;
        wire::write(original, segments, &mut file).map_err(fail)?;
        for part in placed {
            let (at, stored) = part?;
            file.seek(SeekFrom::Start(at as u64)).map_err(fail)?;
            let mut written = Ok(());
            stored.each(|piece| {
                if written.is_ok() {
                    written = file.write_all(piece);
                }
            })?;
            written.map_err(fail)?;
        }
        // A file that is replaced keeps its permissions.
        if let Ok(before) = fs::metadata(&target) {
            fs::set_permissions(&path, before.permissions()).map_err(fail)?;
        }
        file.sync_all().map_err(fail)?;
        self.files.push(relative.to_path_buf());
        Ok(())
    }

    /// Makes a file that stays where it is visible beside the staged ones.
    pub fn refer(&mut self, location: &str, source: &Path) -> Result<()> {
        let path = self.prepare(Path::new(location))?;
        let source = source.canonicalize().map_err(|e| Error::io(source, e))?;
        fs::hard_link(&source, &path)
            .or_else(|_| fs::copy(&source, &path).map(|_| ()))
            .map_err(|e| Error::io(&source, e))
    }

    /// Renames every file into place and syncs the folders.
    pub fn commit(self) -> Result<Vec<PathBuf>> {
        let mut placed: Vec<Placed> = Vec::new();
        let result = self.place(&mut placed);
        if result.is_err() {
            for p in placed.iter().rev() {
                // Best effort: the first failure is the one to report.
                let _ = match &p.before {
                    Some(before) => fs::rename(before, &p.target),
                    None => fs::remove_file(&p.target),
                };
            }
        }
        result?;
        for folder in placed.iter().filter_map(|p| p.target.parent()) {
            sync(folder)?;
        }
        Ok(placed.into_iter().map(|p| p.target).collect())
    }

    fn place(&self, placed: &mut Vec<Placed>) -> Result<()> {
        let several = self.files.len() > 1;
        for (i, relative) in self.files.iter().enumerate() {
            let target = self.folder.join(relative);
            let fail = |e| Error::io(&target, e);
            if let Some(parent) = target.parent() {
                fs::create_dir_all(parent).map_err(fail)?;
            }
            if target.is_dir() {
                return Err(Error::file(&target, "is a folder"));
            }
            // Only a set of several files can fail half way. The old file keeps its name until the
            // new one takes it.
            let mut before = None;
            if several && target.exists() {
                let keep = self.temporary.path().join(format!("before-{i}"));
                fs::hard_link(&target, &keep)
                    .or_else(|_| fs::copy(&target, &keep).map(|_| ()))
                    .map_err(fail)?;
                before = Some(keep);
            }
            fs::rename(self.inside(relative), &target).map_err(fail)?;
            placed.push(Placed { target: target.clone(), before });
        }
        Ok(())
    }
}

/// Makes the renames in a folder durable.
fn sync(folder: &Path) -> Result<()> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    #[cfg(unix)]
    File::open(folder).and_then(|f| f.sync_all()).map_err(|e| Error::io(folder, e))?;
    let _ = folder;
    Ok(())
}
