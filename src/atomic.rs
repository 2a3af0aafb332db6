//! Single files that appear whole or not at all. (An export, which may be several, is staged in `export`.)

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use tempfile::NamedTempFile;

use crate::error::{Error, Result};

/// Calls `fill` on a temporary file beside `path`, syncs it and renames it to `path`: a reader sees the old file or
/// the whole new one, whatever happens in between.
pub(crate) fn write(path: &Path, fill: impl FnOnce(&mut BufWriter<&File>) -> Result<()>) -> Result<()> {
    write_named(path, |temporary| {
        let mut buffered = BufWriter::with_capacity(1 << 16, temporary.as_file());
        fill(&mut buffered)?;
        buffered.flush().map_err(|e| Error::io(path, e))
    })
}

/// As [`write`], `fill` being given the temporary file: it may also put another in its place.
pub(crate) fn write_named(path: &Path, fill: impl FnOnce(&NamedTempFile) -> Result<()>) -> Result<()> {
    let fail = |e| Error::io(path, e);
    let folder = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".retune-");
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666)); // less the umask, like any new file
    let temporary = builder.tempfile_in(folder).map_err(fail)?;
    fill(&temporary)?;
    // By name: it may have been replaced.
    File::options().write(true).open(temporary.path()).and_then(|f| f.sync_all()).map_err(fail)?;
    temporary.persist(path).map_err(|e| fail(e.error))?;
    // The rename itself, where folders can be synced.
    #[cfg(unix)]
    File::open(folder).and_then(|f| f.sync_all()).map_err(fail)?;
    Ok(())
}

/// Writes `bytes` as [`write`] does.
pub(crate) fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    write(path, |file| file.write_all(bytes).map_err(|e| Error::io(path, e)))
}
