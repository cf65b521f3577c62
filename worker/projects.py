"""Projects that have an endpoint, credentials or limits of their own.

They stand under `projects:` in a YAML file, which may be the policies' own: the worker reads
nothing else of it. Secrets are never in it; it names the variable or the file that holds them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from worker.limiter import Quota
from worker.modelarts import AccessKey, Endpoint, IamUser, Token, validate_project_id
from worker.settings import LEAST_RATE, SettingsError
from worker.yaml_source import YamlError, read_yaml

if TYPE_CHECKING:
    from collections.abc import Mapping

    from worker.modelarts import Credentials
    from worker.settings import Settings

SECRET_FIELDS = ("credentials",)
_LONGEST_SECRET = 64 << 10


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SecretRef(_Part):
    """Where a secret is: in an environment variable, or in a file."""

    env: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    file: Path | None = None

    @model_validator(mode="before")
    @classmethod
    def _never_the_secret_itself(cls, value: object) -> object:
        if not isinstance(value, dict | SecretRef):
            raise PydanticCustomError(
                "reference", "a secret is not written here; accepted: {env: NAME} or {file: PATH}"
            )
        return value

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.env is None) == (self.file is None):
            raise PydanticCustomError("reference", "exactly one of env and file is needed")
        return self

    def read(self) -> SecretStr:
        """The secret.

        Raises:
            SettingsError: it is not there.
        """
        if self.env is not None:
            text = os.environ.get(self.env, "")
            where = f"environment variable {self.env}"
        else:
            where = f"file {self.file}"
            try:
                with (self.file or Path()).open() as file:
                    text = file.read(_LONGEST_SECRET).strip()
            except (OSError, UnicodeError) as error:
                raise SettingsError(f"The {where} for a secret cannot be read: {error}") from None
        if not text:
            raise SettingsError(f"The {where} for a secret is empty or not set.")
        return SecretStr(text)


class IamRef(_Part):
    """A user of the identity service."""

    endpoint: str
    user: str
    password: SecretRef
    domain: str


class CredentialsRef(_Part):
    """How to sign in: a token, an access key, or a user of the identity service."""

    token: SecretRef | None = None
    ak: SecretRef | None = None
    sk: SecretRef | None = None
    security_token: SecretRef | None = None
    iam: IamRef | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        ways = [self.token is not None, self.ak is not None, self.iam is not None]
        if sum(ways) != 1 or (self.ak is None) != (self.sk is None):
            raise PydanticCustomError(
                "credentials", "exactly one of token, ak with sk, and iam is needed"
            )
        if self.security_token is not None and self.ak is None:
            raise PydanticCustomError("credentials", "security_token goes with ak and sk")
        return self

    def read(self, *, insecure_http: bool) -> Credentials:
        """The credentials.

        Raises:
            SettingsError: a secret is not there.
        """
        if self.token is not None:
            return Token(self.token.read())
        if self.ak is not None and self.sk is not None:
            temporary = self.security_token.read() if self.security_token else None
            return AccessKey(self.ak.read(), self.sk.read(), temporary)
        if self.iam is None:
            raise SettingsError("The credentials are incomplete.")
        try:
            endpoint = Endpoint.parse(self.iam.endpoint, insecure_http=insecure_http)
        except ValueError as error:
            raise SettingsError(f"credentials.iam.endpoint: {error}") from None
        return IamUser(
            endpoint=endpoint,
            name=self.iam.user,
            password=self.iam.password.read(),
            domain=self.iam.domain,
        )


class Project(_Part):
    """A project: what is not given is as the settings say."""

    id: str
    insecure_http: bool = False
    endpoint: str | None = None
    credentials: CredentialsRef | None = None
    rate_limit: Annotated[float, Field(ge=LEAST_RATE, le=100_000, allow_inf_nan=False)] | None = (
        None
    )
    rate_burst: Annotated[int, Field(ge=1, le=100_000)] | None = None

    @field_validator("id")
    @classmethod
    def _is_an_id(cls, value: str) -> str:
        return validate_project_id(value)

    @field_validator("endpoint")
    @classmethod
    def _is_an_endpoint(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None:
            Endpoint.parse(value, insecure_http=info.data.get("insecure_http", False))
        return value


def _each_id_once(projects: dict[str, Project]) -> dict[str, Project]:
    # Looked up by its id, one of two would be dropped in silence.
    ids = [project.id for project in projects.values()]
    if twice := sorted({each for each in ids if ids.count(each) > 1}):
        raise PydanticCustomError("twice", "project id {id}: there twice", {"id": ", ".join(twice)})
    return projects


EACH_ID_ONCE = AfterValidator(_each_id_once)
"""Makes a field of projects by name refuse two with the same id."""


class _ProjectsFile(BaseModel):
    """Any YAML file with `projects:`; the rest of it is somebody else's."""

    model_config = ConfigDict(extra="ignore")

    projects: Annotated[dict[str, Project], EACH_ID_ONCE] = {}


def read_projects(path: Path) -> dict[str, Project]:
    """The projects in a YAML file, by the names that it gives them.

    Raises:
        YamlError: the file, or a project in it, is not as it must be.
    """
    source = read_yaml(path)
    try:
        return _ProjectsFile.model_validate(source.data).projects
    except ValidationError as error:
        raise YamlError(source.sentences(error, secret=SECRET_FIELDS)) from None


class Directory:
    """Which project is reached how: the projects' own words first, then the settings'.

    Args:
        settings: endpoint, credentials and rate of every project that has none of its own.
        projects: those that have.
    """

    def __init__(self, settings: Settings, projects: Mapping[str, Project]) -> None:
        self.settings = settings
        self._by_name = dict(projects)
        self._by_id = {project.id: project for project in projects.values()}

    @classmethod
    def of(cls, settings: Settings) -> Directory:
        """The directory of a process: its settings and their projects file.

        Without one it is the policies' file: a project must not be looked for at another endpoint
        than the one that policies are carried out at.

        Raises:
            YamlError: the file, or a project in it, is not as it must be.
        """
        path = settings.projects_file or settings.policies_file
        return cls(settings, {} if path is None else read_projects(path))

    @property
    def endpoints(self) -> list[str]:
        """The base URLs of every API that is named: the settings' first.

        Raises:
            SettingsError: none is.
        """
        projects = self._by_id.values()
        found = [self._endpoint(project).url for project in projects if project.endpoint]
        if self.settings.endpoint is not None or len(found) < len(self._by_id) or not found:
            found.insert(0, self.settings.api_endpoint.url)
        return list(dict.fromkeys(found))

    def find(self, text: str) -> str:
        """The id of a project that somebody names.

        Args:
            text: the name that the projects file gives it, or its id.

        Raises:
            ValueError: it is neither; one sentence says what is accepted.
        """
        project = self._by_name.get(text)
        return validate_project_id(text) if project is None else project.id

    def at(self, endpoint: str) -> list[str]:
        """The ids of the projects at an endpoint that have something of their own."""
        return [
            project.id
            for project in self._by_id.values()
            if self._endpoint(project).url == endpoint
        ]

    def endpoint(self, project_id: str) -> Endpoint:
        """Where a project's API is.

        Raises:
            SettingsError: neither the project nor the settings say so.
        """
        project = self._by_id.get(project_id)
        return self.settings.api_endpoint if project is None else self._endpoint(project)

    def quota(self, project_id: str) -> Quota:
        """How fast a project may be called."""
        settings, project = self.settings, self._by_id.get(project_id)
        if project is None or (project.rate_limit is None and project.rate_burst is None):
            return Quota(settings.rate_limit, settings.burst)
        rate = settings.rate_limit if project.rate_limit is None else project.rate_limit
        return Quota(rate, project.rate_burst or settings.burst_of(rate))

    def credentials(self, project_id: str) -> Credentials | None:
        """A project's own credentials; None: it has none of its own.

        Raises:
            SettingsError: a secret is not where the project says.
        """
        project = self._by_id.get(project_id)
        if project is None or project.credentials is None:
            return None
        return project.credentials.read(insecure_http=project.insecure_http)

    def check(self, endpoint: str) -> None:
        """See whether anybody can sign in at an endpoint, and that no secret is missing.

        Raises:
            SettingsError: not so; the sentence says what is accepted.
        """
        own = [self.credentials(project_id) for project_id in self.at(endpoint)]
        if not any(own):
            _ = self.settings.credentials

    def _endpoint(self, project: Project) -> Endpoint:
        if project.endpoint is None:
            return self.settings.api_endpoint
        return Endpoint.parse(project.endpoint, insecure_http=project.insecure_http)
