//! Pages that go into a file: as records of a plain stream, or at fixed places.

use std::sync::Arc;
use std::time::Instant;

use super::mapped::MappedFile;
use crate::error::Result;
use crate::io::MainFile;
use crate::run::workers::Crew;
use crate::source::main_writer::MainWriter;
use crate::source::rounds::{RoundContext, Rounds};
use crate::source::shared::SourceShared;
use crate::work::Round;

/// A file that a guest goes to.
pub(in crate::source) struct File {
    file: MainFile,
    /// `None`: pages are records of the stream.
    places: Option<Places>,
}

/// Pages at fixed places, and who writes them.
struct Places {
    file: Arc<MappedFile>,
    rounds: Rounds,
}

impl File {
    /// A plain stream.
    pub(in crate::source) fn plain(file: MainFile) -> Self {
        Self { file, places: None }
    }

    /// Pages at fixed places, written by `workers` threads. `direct`: past the page cache.
    pub(in crate::source) fn mapped(
        main: MainFile,
        direct: bool,
        workers: usize,
        shared: &Arc<SourceShared>,
        crew: &Crew,
    ) -> Result<Self> {
        let file = MappedFile::new(main.clone(), &shared.ram, direct)?;
        let places = Places { file: Arc::new(file), rounds: Rounds::new(crew.stop(), workers) };
        for id in 0..workers {
            places.file.start_worker(id, &places.rounds, shared, crew)?;
        }
        Ok(Self { file: main, places: Some(places) })
    }

    pub(super) fn workers(&self) -> usize {
        self.places.as_ref().map_or(0, |places| places.rounds.workers())
    }

    pub(super) fn announce(&self, main: &mut MainWriter, shared: &SourceShared) -> Result<()> {
        match &self.places {
            Some(places) => places.file.announce(main, &shared.ram),
            None => {
                main.ram_start(&shared.ram);
                Ok(())
            }
        }
    }

    /// With fixed places, the section that is open on `main` stays empty.
    pub(super) fn send_round(
        &self,
        round: Round,
        context: RoundContext,
        main: &mut MainWriter,
        shared: &SourceShared,
    ) -> Result<()> {
        let Some(places) = &self.places else {
            return super::main::send_round(&round, context, main, shared);
        };
        if places.rounds.workers() == 0 {
            places.file.write_round(&round, shared, &shared.session.counters.main)?;
        } else {
            // A page is written again only when all workers are through: the newest stays.
            places.rounds.run(round, context, |_| Ok(()))?;
        }
        if context.last { places.file.write_bitmaps() } else { Ok(()) }
    }

    /// Waits for the disk: what is left to be synced when the guest is paused is little.
    pub(super) fn sync(&self, main: &MainWriter) -> Result<()> {
        self.file.sync().map_err(|error| main.error(error))
    }

    /// A file runs no guest: it is thrown away unless it is whole on the disk, and up to then the
    /// source may run on.
    pub(super) fn finish(&self, end: &[u8], main: &mut MainWriter) -> Result<Instant> {
        main.raw(end)?;
        let sent = Instant::now();
        self.file.finish().map_err(|error| main.error(error))?;
        Ok(sent)
    }

    pub(super) fn dismiss_workers(&self) {
        self.places.iter().for_each(|places| places.rounds.close());
    }

    /// Again, as the switch has done before the workers ended: what they have written meanwhile
    /// goes, too.
    pub(super) fn abort(&self) {
        self.file.abort();
    }
}
