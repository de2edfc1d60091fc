"""All injections, in the order in which they are played."""

from medfast.drill import faults_checkpoint, faults_data, faults_disk, faults_numbers, faults_ranks, faults_signals
from medfast.drill.scene import Injection

__all__ = ["injections"]


def injections() -> list[Injection]:
    return [
        *faults_data.volumes(), *faults_data.workers(), *faults_data.prepare(), *faults_disk.full(),
        *faults_disk.read_only(), *faults_disk.slow(), *faults_checkpoint.damaged(), *faults_checkpoint.leftovers(),
        *faults_checkpoint.other_settings(), *faults_signals.preempted(), *faults_signals.killed(),
        *faults_ranks.ranks(), *faults_numbers.not_finite(), *faults_numbers.clocks(),
    ]  # fmt: skip
