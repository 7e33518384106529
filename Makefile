# Everything here sets itself up: `make demo` and `make test` need nothing but Python 3.10 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TYPED := build/typed
CARD := build/card
THAT_PYTHON = $(if $(findstring /,$(PYTHON)),$(abspath $(PYTHON)),$(PYTHON))
ANOMALIB := build/anomalib
PACKAGES := 'import sysconfig; print(sysconfig.get_path("purelib"))'
BESIDE := 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))'

# cflow_fast with kernels and bench in it, as it is installed, without an installation: a folder to import it from.
define linked
rm -rf $(1) && mkdir -p $(1)/cflow_fast
ln -s "$(CURDIR)"/cflow_fast/* "$(CURDIR)/kernels" "$(CURDIR)/bench" $(1)/cflow_fast
endef

# A path that is given from here, which may have spaces in it.
absolute = $(if $(filter /%,$(firstword $(1))),$(1),$(CURDIR)/$(1))

.PHONY: demo test test-real test-anomalib lint format bench-cpu aot gpu gpu-kernels parity clean
OTHER_TRITON := 3.6.0

demo: $(READY)
	$(BIN)/cflow-fast demo --output demo-output

# One thread in each of as many processes as there are cores: threads of several tests would only wait for each other.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

# Trains on MVTec AD's bottle. CFLOW_FAST_DATA: a folder with mvtec/bottle; CFLOW_FAST_WEIGHTS: one with encoder weights.
test-real: $(READY)
	$(BIN)/python -m pytest -m real -rs -s

# With anomalib itself, in an environment of its own upon the other one.
test-anomalib: $(ANOMALIB)/.ready
	$(ANOMALIB)/bin/python -c "import anomalib.models.image.cflow.torch_model"
	$(ANOMALIB)/bin/python -m pytest tests/test_anomalib.py

$(ANOMALIB)/.ready: $(READY)
	$(BIN)/python -m venv $(ANOMALIB)
	$(BIN)/python -c $(BESIDE) > "$$($(ANOMALIB)/bin/python -c $(PACKAGES))/beside.pth"
	$(ANOMALIB)/bin/python -m pip install --quiet 'anomalib==2.7.*'
	touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(call linked,$(TYPED))
	cd $(TYPED) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p cflow_fast

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# RESULTS: a JSON file, or a folder for one that is named after the CPU.
bench-cpu: $(READY)
	$(BIN)/python -m pytest bench --benchmark-only -s --results $(or $(RESULTS),bench/results)

# Every kernel compiled for cards that are not here, by the installed Triton and by an older one, and what to expect.
# AOT=--quick: only the usual ones.
aot: $(READY) build/triton-$(OTHER_TRITON)
	env -u TRITON_INTERPRET $(BIN)/python -m cflow_fast.bench.aot $(AOT) --json build/kernels.json \
	    --predictions $(if $(AOT),build,bench)/predicted.json
	env -u TRITON_INTERPRET PYTHONPATH=build/triton-$(OTHER_TRITON) \
	    $(BIN)/python -m cflow_fast.bench.aot $(AOT) --no-predictions

build/triton-$(OTHER_TRITON): $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --target $@ triton==$(OTHER_TRITON)

# On a machine with an NVIDIA GPU, which may be offline: installs nothing, uses the Python that it is given. Run from
# the folder of links: the first place that Python looks in is where it is started. OUTPUT: a folder in the place of
# bench/results/<card>. PACK: a .tar.gz of all that is in it, kept up to date from step to step. KERNELS: an archive of
# what `make gpu-kernels` compiled. SUITE: more of its options.
gpu:
	$(call linked,$(CARD))
	cd $(CARD) && TRITON_INTERPRET=0 PYTHONPATH="$(CURDIR)/$(CARD)$${PYTHONPATH:+:$$PYTHONPATH}" \
	    $(THAT_PYTHON) -m cflow_fast.bench.gpu \
	    $(if $(OUTPUT),--output "$(call absolute,$(OUTPUT))") $(if $(PACK),--pack "$(call absolute,$(PACK))") \
	    $(if $(KERNELS),--kernels "$(call absolute,$(KERNELS))") $(SUITE)

# What `make gpu` launches, compiled here for a card elsewhere (SUITE: options that say which): with PYTHON, which has to
# have the versions of Python and Triton that are there, and the other packages; unless it is given, with the tests'.
gpu-kernels: $(if $(filter file,$(origin PYTHON)),$(READY))
	$(call linked,$(CARD))
	cd $(CARD) && env -u TRITON_INTERPRET PYTHONPATH="$(CURDIR)/$(CARD)$${PYTHONPATH:+:$$PYTHONPATH}" \
	    $(if $(filter file,$(origin PYTHON)),"$(CURDIR)/$(BIN)/python",$(THAT_PYTHON)) -m cflow_fast.bench.ahead \
	    "$(call absolute,$(or $(KERNELS),build/gpu-kernels.tar.xz))" --cache "$(CURDIR)/build/gpu-kernels" $(SUITE)

parity: $(READY)
	$(BIN)/cflow-fast parity

$(READY): pyproject.toml $(wildcard kernels/cpu/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test,demo,lint]'
	touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info demo-output kernels/*.so
