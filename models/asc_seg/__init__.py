"""ASC-Seg and its twin without Mamba."""

from segfleet.models.asc_seg import network as network
