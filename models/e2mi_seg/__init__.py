"""E2MISeg in three set-ups."""

from segfleet.models.e2mi_seg import network as network
