"""Measuring a trained model and drawing what came out. Import the modules by name: `plots` needs matplotlib, measurements need torch."""
