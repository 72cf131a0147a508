# What a person runs is what CI runs. Two environments in one: `make serve` installs what serving needs, the rest adds
# the training and test extras. With another Python: make test-fast PYTHON=python3.13 VENV=.venv-3.13. TORCH_INDEX is
# the index that torch comes from. Unset, deploy/torch_index.py chooses: where no NVIDIA driver is found PyTorch's index
# of builds without CUDA, else the default index, whose Linux build brings CUDA (gigabytes).
PYTHON ?= python3
TORCH_INDEX ?=
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Tests side by side, one process a core up to four: the most that the servers which they start leave room for.
PYTEST := -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal
RUN ?= runs/mnist
ENGINE ?= docker
TORCH ?= cpu

PEERS := mosec triton litserve bentoml ray
CLIENTS ?= $(patsubst tests/clients/%.txt,%,$(wildcard tests/clients/*.txt))

.PHONY: serve test test-clients test-ray test-fast test-lowest install check train docs site bench bench-training image sbom clean

serve: $(VENV)/serving
	$(BIN)/python -m service

test: check
	$(BIN)/python $(PYTEST)

# Other projects' clients, against the service. Each has an environment of its own, for their pins contradict ours and one
# another's. A few of them: make test-clients CLIENTS="tritonclient".
test-clients: $(VENV)/serving $(CLIENTS:%=.clients/%/installed)
	$(BIN)/python tests/clients/run.py $(CLIENTS)

# The service on real Ray, in an environment of its own, and in a network of its own, as Ray listens on every interface.
test-ray:
	$(MAKE) VENV=.venv-ray .venv-ray/ray
	.venv-ray/bin/python tests/ray/run.py

# For the moment between two edits.
test-fast: $(VENV)/everything
	$(BIN)/python $(PYTEST) -m "not slow"

# Serving on the lowest versions of its ranges in pyproject.toml: its tests, those of what it takes from models/, and the
# client's, which names the same ones.
test-lowest:
	$(MAKE) VENV=.venv-lowest .venv-lowest/lowest
	.venv-lowest/bin/python $(PYTEST) tests/service tests/models/images tests/models/inference tests/models/test_bundle.py \
		tests/models/test_networks.py tests/models/networks tests/models/test_signing.py tests/gan_client

install: $(VENV)/everything

check: $(VENV)/everything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@$(BIN)/python -m deploy.audit.audit

# The container image, with what its labels say of it. ENGINE=podman, with --format docker for the health check:
# make image ENGINE="podman" FLAGS="--format docker". TORCH=cuda makes the large one.
image:
	$(ENGINE) build $(FLAGS) --tag gan-service --build-arg TORCH=$(TORCH) --build-arg TORCH_INDEX=$(TORCH_INDEX) \
		--build-arg VERSION=$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml) \
		--build-arg REVISION=$$(git rev-parse HEAD) --build-arg CREATED=$$(date -u +%Y-%m-%dT%H:%M:%SZ) .

# What serving installs, in CycloneDX's format.
sbom: $(VENV)/serving .sbom/installed
	mkdir -p build
	$(BIN)/python deploy/sbom/serving_pins.py | .sbom/bin/cyclonedx-py requirements - --pyproject pyproject.toml \
		--output-reproducible --output-file build/sbom.cdx.json

train: $(VENV)/everything
	$(BIN)/python -m models train --preset mlp-paper --data mnist --out $(RUN) --resume

docs: $(VENV)/everything
	$(BIN)/python deploy/site/settings_table.py
	$(BIN)/python deploy/kubernetes/prometheus_rule.py
	$(BIN)/python -W ignore::DeprecationWarning -m deploy.grafana.dashboard
	$(BIN)/python -m models toy --out docs/figures
	$(BIN)/python -m models neighbours bundles/mnist-mlp --data mnist --scale 2 --out docs/figures/neighbours.png
	$(BIN)/python -m models interpolate bundles/mnist-mlp --seeds 0 1 2 3 --steps 6 --scale 2 \
		--out docs/figures/interpolation.png
	$(BIN)/python -m models classes bundles/mnist --out docs/figures/gallery/classes.png
	$(BIN)/python -m models interpolate bundles/mnist --seeds 0 1 2 3 --steps 6 --label 3 --scale 2 \
		--out docs/figures/gallery/interpolation.png
	$(BIN)/python -m models verdicts bundles/mnist bundles/mnist-mlp --data mnist --other fashion-mnist \
		--out docs/figures/gallery

# The pages as a site, in build/site. To read it: python -m http.server --directory build/site
site: .site/installed
	.site/bin/python deploy/site/build.py

bench: $(VENV)/serving $(PEERS:%=.bench/%/installed)
	$(BIN)/python -m benchmarks.serving.compare --write

bench-training: $(VENV)/everything .bench/lightning/installed
	$(BIN)/python -m benchmarks.training.step

clean:
	rm -rf .venv* .bench .clients .site .sbom .audit build gan_client/build *.egg-info gan_client/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# Each stamp is younger than the files that decide what is installed, or the install runs again.
# Another Python is refused here: pip would speak of packages, and the next `make` would find this environment made.
$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "Python 3.11 to 3.13 is needed, and $(PYTHON) is none. PYTHON=python3.12 takes another." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/serving: $(VENV)/created pyproject.toml constraints.txt
	@index=$$($(PYTHON) deploy/torch_index.py "$(VENV)" "$(TORCH_INDEX)") && \
		if [ -n "$$index" ]; then $(PIP) --no-deps --index-url "$$index" torch; fi
	$(PIP) --editable .
	touch $@

$(VENV)/everything: $(VENV)/serving gan_client/pyproject.toml
	$(PIP) --editable ".[train,export,import,tensorboard,otlp,bulk,test]" --editable ./gan_client
	touch $@

$(VENV)/ray: $(VENV)/serving
	$(PIP) --editable ".[ray,otlp,test]"
	touch $@

# The pinned versions first, then serving's go down to their lower bounds; what they need themselves follows.
$(VENV)/lowest: $(VENV)/serving
	$(PIP) --editable ".[otlp,test]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		$$(sed -n '/^\(dependencies\|otlp\) = /,/^]/s/^ *"\([^>]*\)>=\([^",; ]*\).*/\1==\2/p' pyproject.toml)
	touch $@

# A peer that can't be installed must not stop the bench: its table says that it is not there.
.bench/%/installed: benchmarks/peers/%.txt benchmarks/peers/work.txt
	$(PYTHON) -m venv .bench/$*
	-$(if $(TORCH_INDEX),.bench/$*/bin/python -m pip install --quiet --no-deps --constraint constraints.txt \
		--index-url $(TORCH_INDEX) torch)
	-.bench/$*/bin/python -m pip install --quiet --disable-pip-version-check --requirement $< && touch $@

.clients/%/installed: tests/clients/%.txt
	$(PYTHON) -m venv .clients/$*
	.clients/$*/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	touch $@

.site/installed .sbom/installed: %/installed:
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	touch $@

.site/installed: deploy/site/requirements.txt
.sbom/installed: deploy/sbom/requirements.txt
