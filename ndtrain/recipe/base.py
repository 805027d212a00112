"""What all sections of a recipe are: frozen pydantic models with strict types."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Dtype = Literal["float32", "bfloat16", "float16"]
Text = Annotated[str, Field(min_length=1)]
Size = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A frozen table of a recipe: no unknown keys, no coercion, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
