"""Safety neurons of large language models: SN-Tune, SSAH and NeuronTune on one model and one evaluation.

Data flows one way: prompts -> scores -> neuron sets -> interventions -> evaluation -> figures.
Importing this package is cheap: torch and transformers are imported by the modules that need them.
"""

__version__ = "0.2.0"
