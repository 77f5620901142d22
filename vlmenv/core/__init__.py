"""The ground floor: spaces, coordinates, answers, rollouts and configuration. Imports no torch."""
