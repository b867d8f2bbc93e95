"""Model families and what the package asks of one. Importing this package registers LLaMA."""

from megatron_switchlora.model.llama import family as family
