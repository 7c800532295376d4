"""Builds a detector to ship from a study that has run: its networks, with all evidence calibrated on real speech of
many sources. From the project's folder:

    PYTHONPATH=. python examples/ship.py multi lib/weights/detector --real MANIFEST.csv --like lib/weights/detector
    PYTHONPATH=. python examples/ship.py single lib/weights/one_speaker

The manifest has the columns path, speaker and corpus. `--like` takes the texture student and the choice of recordings
from a detector that was shipped before (their names are in its detector.json); without it the student is fitted on two
thirds of the manifest's voices and the evidence on the rest. Without a manifest, all of it is the experiment's own."""

import argparse
import json
from pathlib import Path

import pandas as pd

from lib import seeds
from lib.data.audio import decode_g722, header, read_audio
from lib.data.degradations import recorded
from lib.data.packages import embedded_sources
from lib.detector import Detector
from lib.evaluate.systems import evidence_detector
from lib.model.texture import roughness, train_texture_student
from lib.recordings.explaining import write_known
from lib.settings import RATE_HZ
from lib.study import Study

EMBEDDED_S = 36  # recordings of each embedded validation voice


def named(source):
    """The name of an embedded recording in the list of what a detector was fitted on."""
    return f"{source.corpus}:{'/'.join(source.path.parts[-3:])}"


def own_rate(path):
    """A recording at its own rate, which lines are read at: (samples (samples,), rate in Hz)."""
    if path.suffix == ".g722":
        return decode_g722(path), RATE_HZ
    rate_hz = min(max(header(path)[1], RATE_HZ), 48_000)
    return read_audio(path, rate_hz, strict=False)[0], rate_hz


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=["single", "multi"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--real", type=Path)
    parser.add_argument("--like", type=Path)
    parser.add_argument("--preset", default="study")
    chosen = parser.parse_args()
    study = Study.open(chosen.preset)
    detector = study.detector(chosen.experiment)
    if not chosen.real:
        detector = evidence_detector(study, chosen.experiment)
    else:
        table = pd.read_csv(chosen.real, dtype=str)
        places = {Path(path).name: (chosen.real.parent / path, row) for path, row in zip(table.path, table.corpus)}
        for source in embedded_sources():
            if source.split == "validation":
                places.setdefault(named(source), (source.path, source.corpus))
        if chosen.like:
            names = json.loads((chosen.like / "detector.json").read_text())["fitted_on"]["evidence"]
            student = Detector.load(chosen.like).evidence.student
        else:
            voices = table.speaker.drop_duplicates().sample(frac=0.65, random_state=0)
            fitted = table[table.speaker.isin(voices)]
            audios = [read_audio(chosen.real.parent / path, RATE_HZ, strict=False)[0] for path in fitted.path]
            copies = [recorded(audio, seeds.stream(0, "chain", path)) for audio, path in zip(audios, fitted.path)]
            student = train_texture_student([roughness(audio) for audio in audios + copies], 0, 1500)
            rest = table[~table.speaker.isin(voices)]
            embedded = pd.Series([name for name in places if ":" in name])
            voice = embedded.str.split("/").str[0]
            few = embedded.sample(frac=1, random_state=0).groupby(voice).head(EMBEDDED_S)
            names = [Path(name).name for name in rest.path] + few.tolist()
        chosen_ones = [places[name] for name in names]
        recordings = (own_rate(path) for path, _ in chosen_ones)
        detector.fit_evidence(recordings, [corpus for _, corpus in chosen_ones], student, names)
    detector.save(chosen.out)
    test = study.scores(chosen.experiment).query(f"{chosen.experiment} == 'test'")
    write_known(chosen.out, test[["role", "generator", "anomaly"]].itertuples(index=False))
    print(f"{chosen.out}: {len(detector.evidence.seconds)} recordings behind the evidence")
    for source, rate in detector.evidence.false_alarms().items():
        print(f"  false alarms at 5 % of {source}, left out of the calibration: {rate:.1%}")


if __name__ == "__main__":
    main()
