"""Everything that depends on transformers: configs, meta models, tokenizers, attention, routers, weight names."""

import transformers

# transformers warns about plan and loading details; ndtrain's own notes report the ones that matter.
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
