"""Pipelines: cutting a graph into stages, simulating schedules, and searching for the best of both."""
