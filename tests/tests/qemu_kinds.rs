//! Kinds of QEMU source that differ in what they wait for, send early, or may begin.

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use multifd_tests::{
        BootSector, CheckpointFiles, Compression, Fill, Multifd, Outcome, Qemu, QemuBuilder, Receive,
        Scratch, Settings, Side, ram, skip, skip::newest_qemu, skip_without_qemu,
    };

    const SOON: Duration = Duration::from_secs(60);

    fn guest(scratch: &Scratch) -> Outcome<QemuBuilder> {
        let floppy = scratch.path("floppy");
        BootSector::new().laps_per_second(50).write_floppy(&floppy)?;
        Ok(Qemu::builder().floppy(&floppy))
    }

    fn settings(channels: Option<u8>) -> Settings {
        Settings { channels, compression: Compression::None, return_path: true, ..Settings::default() }
    }

    /// Moves the guest of a running source into a checkpoint, with the same RAM.
    fn received(source: &mut Qemu, settings: &Settings, out: &Path) -> Outcome<CheckpointFiles> {
        let mut receive = Receive::listen("tcp:127.0.0.1:0", out)?;
        source.set_up(settings, Side::Source)?;
        source.migrate(receive.uri())?;
        if let Err(failure) = source.wait_completed(SOON) {
            return Err(receive.process().explain(failure));
        }
        receive.wait_success(SOON)?;
        let checkpoint = CheckpointFiles::open(out)?;
        ram::check_equal(source.ram(), &checkpoint.block("pc.ram")?)?;
        Ok(checkpoint)
    }

    #[test]
    fn a_source_whose_machine_type_is_its_own_from_11_1_on() -> Outcome {
        let program = match newest_qemu() {
            Ok(program) => program,
            Err(why) => skip!("{why}"),
        };
        for channels in [None, Some(2)] {
            for capabilities in [vec![], vec!["switchover-ack"]] {
                let scratch = Scratch::new()?;
                let mut source = guest(&scratch)?.program(&program).fill(Fill::new(1)).spawn("source")?;
                source.serial().wait_lines(2, 0, SOON)?;
                let settings = Settings { capabilities, ..settings(channels) };
                received(&mut source, &settings, &scratch.path("checkpoint"))?;
            }
        }
        Ok(())
    }

    #[test]
    fn a_source_that_waits_for_an_acknowledgement_behind_an_old_machine_type() -> Outcome {
        skip_without_qemu!();
        for channels in [None, Some(2)] {
            let scratch = Scratch::new()?;
            let machine = guest(&scratch)?.machine("pc-i440fx-7.2");
            let mut source = machine.fill(Fill::new(2)).spawn("source")?;
            source.serial().wait_lines(2, 0, SOON)?;
            source.stop()?;
            let settings = Settings { capabilities: vec!["switchover-ack"], ..settings(channels) };
            received(&mut source, &settings, &scratch.path("checkpoint"))?;
        }
        Ok(())
    }

    /// A QEMU that is held before the switch-over says nothing, for as long as its operator likes.
    #[test]
    fn a_source_that_is_held_may_be_silent_for_longer_than_the_timeout() -> Outcome {
        skip_without_qemu!();
        for channels in [None, Some(2)] {
            let scratch = Scratch::new()?;
            let out = scratch.path("checkpoint");
            let mut source = guest(&scratch)?.fill(Fill::new(4)).spawn("source")?;
            source.serial().wait_lines(2, 0, SOON)?;
            let flags = ["--timeout", "4s", "--hold-timeout", "1h"];
            let mut receive = Receive::listen_with("tcp:127.0.0.1:0", &out, &flags)?;
            let settings = Settings { capabilities: vec!["pause-before-switchover"], ..settings(channels) };
            source.set_up(&settings, Side::Source)?;
            source.migrate(receive.uri())?;
            source.wait_status("pre-switchover", SOON)?;
            let held = |said: &[u8]| {
                let said = String::from_utf8_lossy(said);
                said.contains("as for a source that is held before the switch-over").then_some(())
            };
            receive.process().stderr().wait_until("the timeout", SOON, held)?;
            source.execute("migrate-continue", serde_json::json!({ "state": "pre-switchover" }))?;
            if let Err(failure) = source.wait_completed(SOON) {
                return Err(receive.process().explain(failure));
            }
            receive.wait_success(SOON)?;
            ram::check_equal(source.ram(), &CheckpointFiles::open(&out)?.block("pc.ram")?)?;
        }
        Ok(())
    }

    #[test]
    fn the_state_that_virtio_mem_sends_early_goes_before_the_pages_again() -> Outcome {
        skip_without_qemu!();
        for channels in [None, Some(2)] {
            let scratch = Scratch::new()?;
            let machine = guest(&scratch)?
                .argument("-m")
                .argument("64M,slots=2,maxmem=1G")
                .argument("-object")
                .argument("memory-backend-ram,id=plugged,size=128M")
                .device("virtio-mem-pci,id=mem,memdev=plugged,requested-size=64M");
            let mut source = machine.clone().fill(Fill::new(3)).spawn("source")?;
            source.serial().wait_lines(2, 0, SOON)?;
            let settings = settings(channels);
            let checkpoint = received(&mut source, &settings, &scratch.path("checkpoint"))?;
            let early = std::fs::read(checkpoint.directory().join("early-state.bin"))?;
            let name = b"virtio-mem-device-early";
            assert!(early.windows(name.len()).any(|window| window == name), "{early:?}");
            let directory = checkpoint.directory().display().to_string();
            let mut inspect = Multifd::spawn("inspect", ["inspect", &directory])?;
            inspect.wait_success(SOON)?;
            inspect.stdout()?.settle(SOON);
            assert!(inspect.stdout()?.text().contains("virtio-mem-device-early"));

            let mut destination = machine.incoming("defer").spawn("destination")?;
            destination.set_up(&settings, Side::Destination)?;
            let uri = destination.listen("tcp:127.0.0.1:0")?;
            let mut send = Multifd::send(checkpoint.directory(), &uri, &settings)?;
            send.wait_success(SOON).map_err(|failure| destination.explain(failure))?;
            destination.wait_completed(SOON)?;
            assert_eq!(destination.run_state()?, "running", "as it was at the source");
            destination.serial().wait_lines(3, 0, SOON)?;
        }
        Ok(())
    }
}
