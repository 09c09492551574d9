# syntax=docker/dockerfile:1

FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
# Dependencies and the target folder stay in the builder's cache between builds.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked --bin pulsebus \
 && install -D -m 0755 target/release/pulsebus /out/pulsebus

FROM debian:bookworm-slim
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 pulsebus \
 && useradd --uid 10001 --gid 10001 --home-dir /var/lib/pulsebus --shell /usr/sbin/nologin pulsebus \
 && install -d -m 0700 -o pulsebus -g pulsebus /var/lib/pulsebus \
 && install -d -m 0755 /etc/pulsebus
COPY --from=build /out/pulsebus /usr/local/bin/pulsebus

# Where data_dir is unless it is configured.
ENV STATE_DIRECTORY=/var/lib/pulsebus
VOLUME /var/lib/pulsebus
USER 10001:10001
# To be reached from outside the container it must listen on 0.0.0.0, which needs a token:
# -e PULSEBUS_HTTP__LISTEN=0.0.0.0:8077 -e PULSEBUS_HTTP__TOKEN=…
EXPOSE 8077
# Alive, not ready: a broker that is away is no reason to start the container anew.
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 \
    CMD ["pulsebus", "healthcheck"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["pulsebus"]
CMD ["run"]
